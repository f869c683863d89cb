/// One message of a conversation.
public struct ChatMessage: Sendable, Hashable, Codable {
    /// Who says it. Any role that the model's chat template knows may be given as `Role(rawValue:)`.
    public struct Role: RawRepresentable, Sendable, Hashable, Codable {
        public let rawValue: String

        public init(rawValue: String) {
            self.rawValue = rawValue
        }

        /// Instructions for the whole conversation.
        public static let system = Role(rawValue: "system")
        /// The person.
        public static let user = Role(rawValue: "user")
        /// The model.
        public static let assistant = Role(rawValue: "assistant")
    }

    /// Who says it.
    public var role: Role
    /// What is said.
    public var content: String

    /// A message of any role.
    public init(role: Role, content: String) {
        self.role = role
        self.content = content
    }

    /// Instructions for the whole conversation.
    public static func system(_ content: String) -> ChatMessage {
        ChatMessage(role: .system, content: content)
    }

    /// What the person says.
    public static func user(_ content: String) -> ChatMessage {
        ChatMessage(role: .user, content: content)
    }

    /// What the model said before.
    public static func assistant(_ content: String) -> ChatMessage {
        ChatMessage(role: .assistant, content: content)
    }
}
