import Foundation

/// Turns the data of a stream's events into ``ChatEvent``s.
struct ChatStreamDecoder {
    /// Whether the stream's end mark has come.
    private(set) var isFinished = false
    private var finishReason: FinishReason?
    private var usage: Usage?

    private struct Chunk: Decodable {
        struct Choice: Decodable {
            struct Delta: Decodable {
                let content: String?
                let reasoning: String?
            }

            let delta: Delta?
            let finish_reason: FinishReason?
        }

        struct Speculation: Decodable {
            let tokens: [GeneratedToken]?
            let round: SpeculationRound?
        }

        let choices: [Choice]?
        let usage: Usage?
        let speculation: Speculation?
        let error: ErrorBody.Detail?
    }

    /// What one event's data says.
    ///
    /// - Throws: ``LLMCadError/generationFailed(_:)`` when the server reports that it failed, else
    ///   ``LLMCadError/malformedResponse(_:)``.
    mutating func events(of data: String) throws -> [ChatEvent] {
        if data == "[DONE]" {
            return [try finish()]
        }
        let chunk: Chunk
        do {
            chunk = try JSONDecoder().decode(Chunk.self, from: Data(data.utf8))
        } catch {
            throw LLMCadError.malformedResponse(decodingProblem(error))
        }
        if let error = chunk.error {
            throw LLMCadError.generationFailed(error.message)
        }
        var events: [ChatEvent] = []
        if let round = chunk.speculation?.round {
            events.append(.round(round))
        }
        let choice = chunk.choices?.first
        let text = choice?.delta?.content ?? ""
        let reasoning = choice?.delta?.reasoning ?? ""
        var tokens = chunk.speculation?.tokens ?? []
        if !reasoning.isEmpty {
            events.append(.reasoning(reasoning, tokens: text.isEmpty ? tokens : []))
            tokens = text.isEmpty ? [] : tokens
        }
        if !text.isEmpty || !tokens.isEmpty {
            events.append(.text(text, tokens: tokens))
        }
        finishReason = choice?.finish_reason ?? finishReason
        usage = chunk.usage ?? usage
        return events
    }

    private mutating func finish() throws -> ChatEvent {
        guard let finishReason else {
            throw LLMCadError.malformedResponse("the stream ended without a finish_reason")
        }
        isFinished = true
        return .finished(finishReason, usage: usage)
    }
}
