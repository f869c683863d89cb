#if os(macOS) || os(Linux)
import XCTest

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

@testable import LLMCad

/// A real `llmcad-mlx serve`, started by ``LLMCadServer`` itself.
///
/// `LLMCAD_SERVER_COMMAND` is the path of `llmcad-mlx`, `LLMCAD_SERVER_ARGUMENTS` options of `serve` with a line
/// break between them. Without the first, the tests are skipped.
final class RealServerTests: XCTestCase {
    private static let key = "a-key-for-these-tests"
    private static let shared = Locked<(server: LLMCadServer, client: LLMCadClient)?>(nil)

    private let question: [ChatMessage] = [
        .system("Be brief."), .user("Count from one to twenty, again and again."),
    ]

    private static func configuration() throws -> LLMCadServerConfiguration {
        let environment = ProcessInfo.processInfo.environment
        guard let command = environment["LLMCAD_SERVER_COMMAND"], !command.isEmpty else {
            throw XCTSkip("LLMCAD_SERVER_COMMAND is not set to the path of llmcad-mlx")
        }
        let arguments = environment["LLMCAD_SERVER_ARGUMENTS"] ?? ""
        return LLMCadServerConfiguration(
            command: [command],
            arguments: arguments.split(separator: "\n").map(String.init),
            apiKey: key,
            stopGrace: .seconds(30),
            maximumRestarts: 1)
    }

    /// The one server of these tests, started by the first that needs it.
    private func client() async throws -> LLMCadClient {
        if let running = Self.shared.withLock({ $0 }) { return running.client }
        let server = LLMCadServer(try Self.configuration())
        let client = try await server.start()
        Self.shared.withLock { $0 = (server, client) }
        return client
    }

    override class func tearDown() {
        guard let running = shared.withLock({ $0 }) else { return }
        let stopped = DispatchSemaphore(value: 0)
        Task {
            await running.server.stop()
            stopped.signal()
        }
        stopped.wait()
    }

    func testHealthAndModels() async throws {
        let client = try await client()
        let health = try await client.health()
        XCTAssertEqual(health.status, "ok")
        let models = try await client.models()
        let model = try XCTUnwrap(models.first)
        XCTAssertEqual(models.count, 1)
        XCTAssertEqual(model.ownedBy, "llmcad-mlx")
        XCTAssertGreaterThan(try XCTUnwrap(model.contextLength), 0)
    }

    func testAStreamAndAChatGiveTheSameText() async throws {
        let client = try await client()
        let options = ChatOptions(maxTokens: 12, temperature: 0.8, seed: 7)
        let answer = try await client.chat(question, options: options)
        XCTAssertFalse(answer.text.isEmpty)
        XCTAssertEqual(answer.usage.totalTokens, answer.usage.promptTokens + answer.usage.completionTokens)
        let figures = try XCTUnwrap(answer.usage.speculation)
        XCTAssertEqual(figures.seed, 7)
        XCTAssertGreaterThan(figures.targetPasses, 0)

        var text = ""
        var tokens: [GeneratedToken] = []
        var rounds: [SpeculationRound] = []
        var end: (FinishReason, Usage?)?
        for try await event in client.stream(question, options: options, details: [.tokens, .rounds]) {
            XCTAssertNil(end, "an event after the last one")
            switch event {
            case .reasoning: XCTFail("a model that does not think")
            case .text(let piece, let ofPiece):
                text += piece
                tokens += ofPiece
            case .round(let round): rounds.append(round)
            case .finished(let reason, let usage): end = (reason, usage)
            }
        }
        XCTAssertEqual(text, answer.text)
        XCTAssertEqual(tokens.map(\.text).joined(), text)
        let (reason, usage) = try XCTUnwrap(end)
        XCTAssertEqual(reason, answer.finishReason)
        XCTAssertEqual(usage?.completionTokens, answer.usage.completionTokens)
        XCTAssertEqual(rounds.map(\.index), Array(0..<rounds.count))
        XCTAssertFalse(rounds.isEmpty)
        for round in rounds {
            XCTAssertEqual(round.nodes.first?.parent, -1)
            for (index, node) in round.nodes.enumerated() {
                XCTAssertLessThan(node.parent, index)
            }
        }
    }

    func testTokensOfTheDraftAreMarked() async throws {
        let client = try await client()
        let options = ChatOptions(maxTokens: 64, temperature: 0, policy: .chain)
        var fromDraft = 0
        var figures: SpeculationFigures?
        for try await event in client.stream(question, options: options, details: .tokens) {
            switch event {
            case .reasoning: XCTFail("a model that does not think")
            case .text(_, let tokens): fromDraft += tokens.filter(\.fromDraft).count
            case .round: XCTFail("a round that was not asked for")
            case .finished(_, let usage): figures = usage?.speculation
            }
        }
        XCTAssertGreaterThan(fromDraft, 0)
        XCTAssertEqual(fromDraft, figures?.accepted)
        XCTAssertEqual(figures?.policy, .chain)
    }

    func testErrors() async throws {
        let client = try await client()
        let outOfRange = await llmcadError { try await client.chat(question, options: ChatOptions(topP: 7)) }
        guard case .badRequest(let message, "top_p") = outOfRange else {
            return XCTFail("\(String(describing: outOfRange))")
        }
        XCTAssertTrue(message.contains("top_p"), message)
        let ofStream = await llmcadError {
            for try await _ in client.stream(question, options: ChatOptions(topP: 7)) {}
        }
        XCTAssertEqual(ofStream, outOfRange)
        let stranger = LLMCadClient(endpoint: client.endpoint, apiKey: "another-key")
        guard case .unauthorized = await llmcadError({ try await stranger.models() }) else {
            return XCTFail("let in with another key")
        }
        let health = try await stranger.health()
        XCTAssertEqual(health.status, "ok")
        let otherModel = await llmcadError {
            try await client.chat(question, options: ChatOptions(model: "no-such-model"))
        }
        guard case .notFound = otherModel else { return XCTFail("\(String(describing: otherModel))") }
    }

    private func metric(_ name: String, _ client: LLMCadClient) async throws -> Double {
        var request = URLRequest(url: client.endpoint.appendingPathComponent("metrics"))
        request.setValue("Bearer \(Self.key)", forHTTPHeaderField: "Authorization")
        var text = ""
        for try await case .body(let data) in HTTPExchange.start(request) {
            text += String(decoding: data, as: UTF8.self)
        }
        let line = text.split(separator: "\n").first { $0.hasPrefix("llmcad_mlx_\(name) ") }
        return try XCTUnwrap(line?.split(separator: " ").last.flatMap { Double($0) }, "\(name) in:\n\(text)")
    }

    /// Options of a generation that only a cancellation ends early: end tokens are never chosen.
    private let endless = ChatOptions(maxTokens: 4000, logitBias: [1: -1000, 2: -1000])

    private func assertStopsEarly(
        _ client: LLMCadClient, line: UInt = #line, _ generate: () async throws -> Void
    ) async throws {
        let before = try await metric("generated_tokens_total", client)
        try await generate()
        var generated = 0.0
        try await eventually("stopped", line: line) {
            generated = try await metric("generated_tokens_total", client) - before
            let running = try await metric("requests_running", client)
            return running == 0 && generated > 0
        }
        XCTAssertLessThan(generated, 4000, line: line)
    }

    func testLeavingTheLoopStopsTheServersGeneration() async throws {
        let client = try await client()
        try await assertStopsEarly(client) {
            for try await event in client.stream(question, options: endless) {
                if case .text = event { break }
            }
        }
    }

    func testCancellingStopsTheServersGeneration() async throws {
        let client = try await client()
        let (question, endless) = (question, endless)
        try await assertStopsEarly(client) {
            let asking = Task { try await client.chat(question, options: endless) }
            try await eventually("asked") { try await metric("requests_running", client) == 1 }
            asking.cancel()
            do {
                _ = try await asking.value
                XCTFail("a whole answer")
            } catch {
                XCTAssertTrue(error is CancellationError, "\(error)")
            }
        }
    }

    func testTheExampleProgram() async throws {
        let client = try await client()
        let answer = try await client.chat([.user("Count.")], options: ChatOptions(maxTokens: 8))
        let program = Process()
        let (output, notes) = (Pipe(), Pipe())
        program.executableURL = productsFolder.appendingPathComponent("llmcad-example")
        program.arguments = [
            "--url", client.endpoint.absoluteString, "--key", Self.key, "--max-tokens", "8", "--rounds",
            "Count.",
        ]
        program.standardOutput = output
        program.standardError = notes
        try program.run()
        let text = try output.fileHandleForReading.readToEnd() ?? Data()
        let figures = String(decoding: try notes.fileHandleForReading.readToEnd() ?? Data(), as: UTF8.self)
        XCTAssertEqual(String(decoding: text, as: UTF8.self), answer.text + "\n")
        XCTAssertTrue(figures.contains("[round 0: "), figures)
        XCTAssertTrue(figures.contains("[8 tokens, length; "), figures)
    }

    func testTheServerComesBackAfterACrash() async throws {
        let client = try await client()
        let server = try XCTUnwrap(Self.shared.withLock { $0 }).server
        let before = try await client.chat(question, options: ChatOptions(maxTokens: 8))
        let identifier = await server.processIdentifier
        kill(try XCTUnwrap(identifier), SIGKILL)
        var crashed = false
        for await state in await server.states() {
            if case .starting = state { crashed = true }
            if case .running = state, crashed { break }
            if case .failed(let exit) = state { return XCTFail("\(exit)") }
        }
        let after = try await client.chat(question, options: ChatOptions(maxTokens: 8))
        XCTAssertEqual(after.text, before.text)
    }
}
#endif
