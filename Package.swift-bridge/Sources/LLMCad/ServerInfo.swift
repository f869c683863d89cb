import Foundation

/// A model that a server offers.
public struct ModelInfo: Sendable, Hashable {
    /// Its name, for ``ChatOptions/model``.
    public let id: String
    /// When it was made, or loaded.
    public let created: Date
    /// What serves it: `llmcad-mlx`.
    public let ownedBy: String
    /// Most tokens of a conversation, answer included; `nil` when the server does not say.
    public let contextLength: Int?
    /// The draft that goes with it; `nil` when there is none.
    public let draft: String?
}

extension ModelInfo: Decodable {
    private enum CodingKeys: String, CodingKey {
        case id, created, draft
        case ownedBy = "owned_by"
        case contextLength = "context_length"
    }

    public init(from decoder: any Decoder) throws {
        let model = try decoder.container(keyedBy: CodingKeys.self)
        id = try model.decode(String.self, forKey: .id)
        created = Date(timeIntervalSince1970: try model.decode(Double.self, forKey: .created))
        ownedBy = try model.decode(String.self, forKey: .ownedBy)
        contextLength = try model.decodeIfPresent(Int.self, forKey: .contextLength)
        draft = try model.decodeIfPresent(String.self, forKey: .draft)
    }
}

/// What a server says of itself.
public struct ServerHealth: Sendable, Hashable, Decodable {
    /// `ok` when it takes requests.
    public let status: String
}
