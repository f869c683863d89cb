import XCTest

@testable import LLMCad

final class DecodingTests: XCTestCase {
    private func decode<Value: Decodable>(_ type: Value.Type, _ json: String) throws -> Value {
        try JSONDecoder().decode(type, from: Data(json.utf8))
    }

    private func decodeStream(_ data: [String]) throws -> [ChatEvent] {
        var decoder = ChatStreamDecoder()
        return try data.flatMap { try decoder.events(of: $0) }
    }

    func testAnswer() throws {
        let answer = try decode(ChatResult.self, Samples.answer)
        XCTAssertEqual(answer.id, "chatcmpl-1")
        XCTAssertEqual(answer.model, "m")
        XCTAssertEqual(answer.text, "Hello")
        XCTAssertEqual(answer.reasoning, "")
        XCTAssertEqual(answer.finishReason, .stop)
        XCTAssertEqual(answer.usage.promptTokens, 10)
        XCTAssertEqual(answer.usage.completionTokens, 8)
        XCTAssertEqual(answer.usage.totalTokens, 18)
        XCTAssertEqual(answer.usage.cachedTokens, 4)
    }

    func testThinking() throws {
        let json = Samples.answer.replacingOccurrences(
            of: #""content": "Hello""#, with: #""content": "Hello", "reasoning": "A greeting.""#)
        let answer = try decode(ChatResult.self, json)
        XCTAssertEqual([answer.text, answer.reasoning], ["Hello", "A greeting."])

        func chunk(_ delta: String, _ token: String) -> String {
            #"{"choices": [{"index": 0, "delta": {\#(delta)}}], "speculation": {"tokens": [\#(token)]}}"#
        }
        let token = #"{"id": 2, "text": "b", "from_draft": true}"#
        let events = try decodeStream([
            chunk(#""reasoning": "pl""#, token), chunk(#""reasoning": "an", "content": "Hi""#, token), chunk("", token),
        ])
        let tokens = [try decode(GeneratedToken.self, token)]
        XCTAssertEqual(
            events,
            [
                .reasoning("pl", tokens: tokens), .reasoning("an", tokens: []), .text("Hi", tokens: tokens),
                .text("", tokens: tokens),
            ])
    }

    func testSpeculationFigures() throws {
        let figures = try XCTUnwrap(decode(Usage.self, Samples.usage).speculation)
        XCTAssertEqual(figures.seed, 7)
        XCTAssertEqual(figures.policy, .throughput)
        XCTAssertEqual(figures.device, "cpu")
        XCTAssertFalse(figures.emulated)
        XCTAssertEqual([figures.targetPasses, figures.drafted, figures.tested, figures.accepted], [3, 20, 12, 5])
        XCTAssertEqual(figures.tokensPerPass, 2.5)
        XCTAssertEqual(figures.acceptanceRate, 0.625)
        XCTAssertEqual([figures.promptSeconds, figures.decodeSeconds, figures.tokensPerSecond], [0.25, 0.5, 16])
        XCTAssertEqual([figures.draftSeconds, figures.verifySeconds], [0.125, 0.25])
        XCTAssertEqual([figures.ioWaitSeconds, figures.otherSeconds], [0.0625, 0.0625])
        XCTAssertEqual(figures.streamedBytes, 1_000_000)
        XCTAssertNil(figures.budgetBytes)
        XCTAssertEqual([figures.pinnedBytes, figures.peakRSSBytes, figures.peakMLXBytes], [5, 6, 7])
    }

    func testUsageOfAServerWithoutSpeculation() throws {
        let usage = try decode(Usage.self, #"{"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}"#)
        XCTAssertEqual(usage.cachedTokens, 0)
        XCTAssertNil(usage.speculation)
    }

    func testAnAnswerWithoutAChoiceIsRefused() {
        let json = Samples.answer.replacingOccurrences(of: #""choices": [{"#, with: #""choices": [], "other": [{"#)
        XCTAssertThrowsError(try decode(ChatResult.self, json))
    }

    func testModel() throws {
        let json = """
            {"id": "m", "object": "model", "created": 1700000000, "owned_by": "llmcad-mlx", "context_length": 8192, \
            "draft": null}
            """
        let model = try decode(ModelInfo.self, json)
        XCTAssertEqual(model.id, "m")
        XCTAssertEqual(model.created, Date(timeIntervalSince1970: 1_700_000_000))
        XCTAssertEqual(model.ownedBy, "llmcad-mlx")
        XCTAssertEqual(model.contextLength, 8192)
        XCTAssertNil(model.draft)
    }

    func testStreamOfTexts() throws {
        let events = try decodeStream([
            Samples.chunk("Hel"), Samples.chunk("lo"), Samples.last, Samples.usageChunk, "[DONE]",
        ])
        let usage = try decode(Usage.self, Samples.usage)
        XCTAssertEqual(
            events, [.text("Hel", tokens: []), .text("lo", tokens: []), .finished(.length, usage: usage)])
    }

    func testTheFirstChunkThatOnlyNamesTheRoleSaysNothing() throws {
        let role = #"{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}"#
        XCTAssertEqual(try decodeStream([role]), [])
    }

    func testTokensAndRounds() throws {
        let speculation = """
            , "speculation": {"tokens": [{"id": 2, "text": "b", "from_draft": true}, \
            {"id": 3, "text": "c", "from_draft": false}], "round": \(Samples.round)}
            """
        let events = try decodeStream([Samples.chunk("bc", speculation)])
        XCTAssertEqual(events.count, 2)
        guard case .round(let round) = events[0], case .text("bc", let tokens) = events[1] else {
            return XCTFail("\(events)")
        }
        XCTAssertEqual(tokens.map(\.id), [2, 3])
        XCTAssertEqual(tokens.map(\.text), ["b", "c"])
        XCTAssertEqual(tokens.map(\.fromDraft), [true, false])
        XCTAssertEqual(round.index, 0)
        XCTAssertEqual(round.nodes.map(\.id), [1, 2])
        XCTAssertEqual(round.nodes.map(\.parent), [-1, 0])
        XCTAssertEqual(round.nodes.map(\.state), [.root, .accepted])
        XCTAssertEqual(round.nodes.map(\.source), [.target, .ngram])
        XCTAssertEqual(round.nodes.map(\.confidence), [1, 0.5])
        XCTAssertEqual(round.bonus, BonusToken(id: 3, text: "c"))
        XCTAssertEqual([round.tokensPerSecond, round.tokensPerPass], [4.5, 1.5])
        XCTAssertEqual(round.peakRSSBytes, 100)
        XCTAssertEqual(round.budgetBytes, 200)
    }

    func testAnErrorInTheStream() {
        let chunk =
            #"{"error": {"message": "out of memory", "type": "server_error", "param": null, "code": null}}"#
        XCTAssertThrowsError(try decodeStream([Samples.chunk("a"), chunk])) { error in
            XCTAssertEqual(error as? LLMCadError, .generationFailed("out of memory"))
        }
    }

    func testChunksThatAreNotWhatTheAPIPromises() {
        let problems = [
            "{": "it is not JSON",
            #"{"choices": 5}"#: "choices has the wrong type",
            Samples.chunk("a", #", "speculation": {"tokens": [{"id": 1, "text": "a"}]}"#):
                "speculation.tokens.0.from_draft is missing",
            "[DONE]": "the stream ended without a finish_reason",
        ]
        for (chunk, problem) in problems {
            XCTAssertThrowsError(try decodeStream([chunk]), chunk) { error in
                XCTAssertEqual(error as? LLMCadError, .malformedResponse(problem))
            }
        }
    }
}
