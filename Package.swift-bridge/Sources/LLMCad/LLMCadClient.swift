import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// A client of a `llmcad-mlx serve`.
///
/// ```swift
/// let client = LLMCadClient(endpoint: URL(string: "http://mac.local:8080")!, apiKey: "…")
/// for try await event in client.stream([.user("Why is the sky blue?")]) {
///     if case .text(let text, _) = event { print(text, terminator: "") }
/// }
/// ```
///
/// All methods throw ``LLMCadError``, or `CancellationError` when their task is cancelled.
public struct LLMCadClient: Sendable {
    /// The server's address, for example `http://127.0.0.1:8080`.
    public let endpoint: URL
    /// Seconds without a byte from the server after which a request fails. Waiting in the server's queue and reading
    /// a long prompt count.
    public let timeout: TimeInterval
    private let apiKey: String?

    /// Makes a client; nothing is sent yet.
    ///
    /// - Parameters:
    ///   - endpoint: The server's address, with or without `/v1`.
    ///   - apiKey: The server's key. `nil`: it has none.
    ///   - timeout: Seconds without a byte from the server after which a request fails.
    public init(endpoint: URL, apiKey: String? = nil, timeout: TimeInterval = 600) {
        self.endpoint = endpoint.lastPathComponent == "v1" ? endpoint.deletingLastPathComponent() : endpoint
        self.apiKey = apiKey
        self.timeout = timeout
    }

    /// The answer to a conversation, in one piece. Cancelling the task stops the server's generation.
    public func chat(_ messages: [ChatMessage], options: ChatOptions = ChatOptions()) async throws -> ChatResult {
        let body = ChatRequest(messages: messages, options: options, stream: nil)
        return try await decode(ChatResult.self, from: chatRequest(body))
    }

    /// The answer to a conversation, as it is made.
    ///
    /// The request is sent at once. Leaving the loop or cancelling its task closes the connection, and the server
    /// stops generating; a cancelled loop ends without ``ChatEvent/finished(_:usage:)`` and without an error. Keep no
    /// reference to the stream beside the loop: the request lives as long as the stream.
    ///
    /// - Parameter details: What to report besides text.
    public func stream(
        _ messages: [ChatMessage],
        options: ChatOptions = ChatOptions(),
        details: StreamDetails = []
    ) -> AsyncThrowingStream<ChatEvent, any Error> {
        AsyncThrowingStream { continuation in
            let task = Task {
                do {
                    let body = ChatRequest(messages: messages, options: options, stream: details)
                    try await receive(try chatRequest(body)) { continuation.yield($0) }
                    continuation.finish()
                } catch is CancellationError {
                    continuation.finish()
                } catch {
                    continuation.finish(throwing: error)
                }
            }
            continuation.onTermination = { _ in task.cancel() }
        }
    }

    /// The models that the server offers.
    public func models() async throws -> [ModelInfo] {
        struct List: Decodable {
            let data: [ModelInfo]
        }
        return try await decode(List.self, from: request("v1/models")).data
    }

    /// The server's state. Needs no key.
    public func health() async throws -> ServerHealth {
        try await decode(ServerHealth.self, from: request("health"))
    }
}

extension LLMCadClient: CustomStringConvertible {
    /// Without the key, which does not belong in a log.
    public var description: String {
        "LLMCadClient(\(endpoint.absoluteString))"
    }
}

extension LLMCadClient {
    private func request(_ path: String) throws -> URLRequest {
        let isHTTP = endpoint.scheme == "http" || endpoint.scheme == "https"
        guard isHTTP, endpoint.host?.isEmpty == false else {
            throw LLMCadError.invalidEndpoint(endpoint.absoluteString)
        }
        var request = URLRequest(url: endpoint.appendingPathComponent(path))
        request.timeoutInterval = timeout
        if let apiKey {
            request.setValue("Bearer \(apiKey)", forHTTPHeaderField: "Authorization")
        }
        return request
    }

    private func chatRequest(_ body: ChatRequest) throws -> URLRequest {
        var request = try request("v1/chat/completions")
        request.httpMethod = "POST"
        request.setValue("application/json", forHTTPHeaderField: "Content-Type")
        do {
            request.httpBody = try JSONEncoder().encode(body)
        } catch {
            // JSON has no infinity and no NaN.
            throw LLMCadError.badRequest(message: "an option is not a finite number", param: nil)
        }
        return request
    }

    private func decode<Answer: Decodable>(_ type: Answer.Type, from request: URLRequest) async throws -> Answer {
        var response: HTTPURLResponse?
        var body = Data()
        for try await part in HTTPExchange.start(request) {
            switch part {
            case .head(let head): response = head
            case .body(let data): body.append(data)
            }
        }
        try Task.checkCancellation()
        try check(response, body)
        do {
            return try JSONDecoder().decode(type, from: body)
        } catch {
            throw LLMCadError.malformedResponse(decodingProblem(error))
        }
    }

    private func receive(_ request: URLRequest, _ report: (ChatEvent) -> Void) async throws {
        var response: HTTPURLResponse?
        var errorBody = Data()
        var lines = ServerSentEvents()
        var decoder = ChatStreamDecoder()
        for try await part in HTTPExchange.start(request) {
            switch part {
            case .head(let head):
                response = head
            case .body(let data) where response?.statusCode != 200:
                errorBody.append(data)
            case .body(let data):
                for event in try lines.append(data) where !decoder.isFinished {
                    try decoder.events(of: event).forEach(report)
                }
            }
        }
        if decoder.isFinished { return }
        try Task.checkCancellation()
        try check(response, errorBody)
        throw LLMCadError.connection(
            .networkConnectionLost, message: "it was closed before the answer was complete")
    }

    private func check(_ response: HTTPURLResponse?, _ body: Data) throws {
        guard let response else {
            throw LLMCadError.malformedResponse("it is not HTTP")
        }
        guard response.statusCode == 200 else {
            let retryAfter = response.value(forHTTPHeaderField: "Retry-After")
            throw LLMCadError(status: response.statusCode, retryAfter: retryAfter, body: body)
        }
    }
}
