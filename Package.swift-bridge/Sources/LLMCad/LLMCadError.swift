import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// Why a request failed. A cancelled request throws `CancellationError` instead.
public enum LLMCadError: Error, Sendable, Hashable {
    /// The endpoint is not an `http` or `https` URL with a host.
    case invalidEndpoint(String)
    /// The server wants an API key, or another one (401).
    case unauthorized(message: String)
    /// The server refused the request (400); `param` names the field where it can be told.
    case badRequest(message: String, param: String?)
    /// The server has no such thing (404), for example no model of that name.
    case notFound(message: String)
    /// The request is larger than the server allows (413).
    case requestTooLarge(message: String)
    /// Too many requests wait (429); seconds after which the server suggests to try again.
    case queueFull(retryAfter: TimeInterval?)
    /// The server is starting or shutting down (503).
    case serverUnavailable(message: String)
    /// Another status: the address does not belong to a `llmcad-mlx serve`, or the server failed.
    case unexpectedStatus(Int, message: String)
    /// The server could not be reached, or the connection broke before the answer was complete.
    case connection(URLError.Code, message: String)
    /// The answer is not what the API promises.
    case malformedResponse(String)
    /// The server reported an error after the answer had begun.
    case generationFailed(String)
}

extension LLMCadError: LocalizedError {
    /// One line that says what happened and, where it can be told, what to do.
    public var errorDescription: String? {
        switch self {
        case .invalidEndpoint(let endpoint):
            "\(endpoint) is not a server's address; give one like http://mac.local:8080"
        case .unauthorized(let message):
            "the server refused the API key: \(message)"
        case .badRequest(let message, _), .notFound(let message):
            message
        case .requestTooLarge(let message):
            "the request is too large: \(message)"
        case .queueFull(let retryAfter?):
            "the server has too many requests waiting; try again in \(Int(retryAfter.rounded(.up))) s"
        case .queueFull(nil):
            "the server has too many requests waiting; try again later"
        case .serverUnavailable(let message):
            "the server does not take requests now: \(message)"
        case .unexpectedStatus(let status, let message):
            "the server answered with status \(status): \(message)"
        case .connection(_, let message):
            "no connection to the server: \(message)"
        case .malformedResponse(let problem):
            "the server's answer could not be read: \(problem)"
        case .generationFailed(let message):
            "the server stopped the answer: \(message)"
        }
    }
}

/// OpenAI's error object.
struct ErrorBody: Decodable {
    struct Detail: Decodable {
        let message: String
        let param: String?
    }

    let error: Detail
}

extension LLMCadError {
    /// The error that an answer with a status other than 200 stands for.
    init(status: Int, retryAfter: String?, body: Data) {
        let detail = (try? JSONDecoder().decode(ErrorBody.self, from: body))?.error
        let message = detail?.message ?? HTTPURLResponse.localizedString(forStatusCode: status)
        switch status {
        case 400: self = .badRequest(message: message, param: detail?.param)
        case 401: self = .unauthorized(message: message)
        case 404: self = .notFound(message: message)
        case 413: self = .requestTooLarge(message: message)
        case 429: self = .queueFull(retryAfter: retryAfter.flatMap(TimeInterval.init))
        case 503: self = .serverUnavailable(message: message)
        default: self = .unexpectedStatus(status, message: message)
        }
    }

    /// The error of a request that did not end with an answer.
    init(transport error: any Error) {
        let code = (error as? URLError)?.code ?? .unknown
        let message =
            switch code {
            case .cannotConnectToHost: "nothing listens at its address; is it running?"
            case .cannotFindHost, .dnsLookupFailed: "its name is unknown in this network"
            case .timedOut: "it sent nothing for too long"
            default: error.localizedDescription
            }
        self = .connection(code, message: message)
    }
}

/// What is wrong with a JSON text, in one line.
func decodingProblem(_ error: any Error) -> String {
    guard let error = error as? DecodingError else { return error.localizedDescription }
    switch error {
    case .keyNotFound(let key, let context):
        return "\(path(context.codingPath + [key])) is missing"
    case .typeMismatch(_, let context), .valueNotFound(_, let context):
        return "\(path(context.codingPath)) has the wrong type"
    case .dataCorrupted(let context):
        return context.codingPath.isEmpty
            ? "it is not JSON" : "\(path(context.codingPath)): \(context.debugDescription)"
    @unknown default:
        return error.localizedDescription
    }
}

private func path(_ keys: [any CodingKey]) -> String {
    keys.map { $0.intValue.map(String.init) ?? $0.stringValue }.joined(separator: ".")
}
