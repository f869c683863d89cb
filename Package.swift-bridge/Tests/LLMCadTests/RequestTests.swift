import XCTest

@testable import LLMCad

final class RequestTests: XCTestCase {
    /// The request's JSON, keys in order.
    private func json(_ options: ChatOptions = ChatOptions(), stream: StreamDetails? = nil) throws -> String {
        let request = ChatRequest(messages: [.user("Hi")], options: options, stream: stream)
        let encoder = JSONEncoder()
        encoder.outputFormatting = .sortedKeys
        return String(decoding: try encoder.encode(request), as: UTF8.self)
    }

    private let messages = #""messages":[{"content":"Hi","role":"user"}]"#

    func testWhatIsNotSetIsNotSent() throws {
        XCTAssertEqual(try json(), "{\(messages)}")
    }

    func testEveryOptionIsSent() throws {
        let options = ChatOptions(
            model: "m", maxTokens: 5, temperature: 0.5, topP: 0.25, topK: 3, minP: 0.125, seed: .max, stop: ["x"],
            presencePenalty: 0.5, frequencyPenalty: 0.75, repetitionPenalty: 1.5, logitBias: [17: -2.5],
            policy: .paper, treeNodes: 9)
        let expected = [
            #""frequency_penalty":0.75"#, #""logit_bias":{"17":-2.5}"#, #""max_tokens":5"#, messages,
            #""min_p":0.125"#, #""model":"m""#, #""policy":"paper""#, #""presence_penalty":0.5"#,
            #""repetition_penalty":1.5"#, #""seed":18446744073709551615"#, #""stop":["x"]"#, #""temperature":0.5"#,
            #""top_k":3"#, #""top_p":0.25"#, #""tree_nodes":9"#,
        ]
        XCTAssertEqual(try json(options), "{\(expected.joined(separator: ","))}")
    }

    func testAStreamAsksForUsageAndForTheDetailsOnly() throws {
        let end = #""stream":true,"stream_options":{"include_usage":true}}"#
        XCTAssertEqual(try json(stream: []), "{\(messages),\(end)")
        XCTAssertEqual(
            try json(stream: .tokens), #"{\#(messages),"speculation":{"tokens":true,"trees":false},\#(end)"#)
        XCTAssertEqual(
            try json(stream: .rounds), #"{\#(messages),"speculation":{"tokens":false,"trees":true},\#(end)"#)
    }

    func testRoles() throws {
        let messages: [ChatMessage] = [.system("a"), .user("b"), .assistant("c")]
        XCTAssertEqual(messages.map(\.role.rawValue), ["system", "user", "assistant"])
        XCTAssertEqual(messages.map(\.content), ["a", "b", "c"])
    }
}
