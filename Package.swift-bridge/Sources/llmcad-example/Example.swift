import Foundation
import LLMCad

/// Asks a server and prints its answer; starts the server first when asked.
@main
struct Example {
    static func main() async {
        let words = Array(CommandLine.arguments.dropFirst())
        if words.contains("--help") || words.contains("-h") {
            return print(Arguments.usage)
        }
        do {
            let arguments = try Arguments(words)
            try await run(arguments)
        } catch let problem as Arguments.Problem {
            Terminal.note("\(problem.message); see llmcad-example --help")
            exit(2)
        } catch {
            Terminal.note(error.localizedDescription)
            exit(1)
        }
    }

    private static func run(_ arguments: Arguments) async throws {
        guard let command = arguments.start else {
            guard let url = URL(string: arguments.url) else {
                throw Arguments.Problem(message: "--url: \(arguments.url) is not an address")
            }
            return try await answer(arguments, LLMCadClient(endpoint: url, apiKey: arguments.key))
        }
        #if os(macOS) || os(Linux)
        var configuration = LLMCadServerConfiguration(command: [command], arguments: arguments.serverOptions)
        if arguments.verbose {
            configuration.log = { Terminal.note($0) }
        }
        let server = LLMCadServer(configuration)
        let client = try await server.start()
        do {
            try await answer(arguments, client)
        } catch {
            await server.stop()
            throw error
        }
        await server.stop()
        #else
        throw Arguments.Problem(message: "--start \(command): a server runs on macOS and Linux only")
        #endif
    }

    private static func answer(_ arguments: Arguments, _ client: LLMCadClient) async throws {
        let events = client.stream(
            [.user(arguments.prompt)],
            options: ChatOptions(maxTokens: arguments.maxTokens),
            details: arguments.rounds ? [.tokens, .rounds] : .tokens)
        for try await event in events {
            switch event {
            case .reasoning(let text, let tokens), .text(let text, let tokens):
                Terminal.write(text, tinted: tokens.contains { $0.fromDraft })
            case .round(let round):
                let accepted = round.nodes.filter { $0.state == .accepted }.count
                let tested = round.nodes.filter { $0.state == .accepted || $0.state == .rejected }.count
                Terminal.note("[round \(round.index): \(tested) nodes tested, \(accepted) accepted]")
            case .finished(let reason, let usage):
                Terminal.write("\n", tinted: false)
                Terminal.note(summary(reason, usage))
            }
        }
    }

    private static func summary(_ reason: FinishReason, _ usage: Usage?) -> String {
        guard let usage else { return "[\(reason.rawValue)]" }
        var parts = ["\(usage.completionTokens) tokens, \(reason.rawValue)"]
        if let figures = usage.speculation {
            parts.append(String(format: "%.1f tokens/s", figures.tokensPerSecond))
            parts.append(String(format: "%.2f tokens per pass", figures.tokensPerPass))
            parts.append("\(figures.accepted) of \(figures.drafted) drafted tokens accepted")
            parts.append("peak \(figures.peakRSSBytes / 1_000_000) MB")
        }
        return "[\(parts.joined(separator: "; "))]"
    }
}

/// The two outputs: the answer, and notes beside it.
enum Terminal {
    private static let hasColour = isatty(STDOUT_FILENO) == 1

    static func write(_ text: String, tinted: Bool) {
        let shown = tinted && hasColour ? "\u{1B}[32m\(text)\u{1B}[0m" : text
        try? FileHandle.standardOutput.write(contentsOf: Data(shown.utf8))
    }

    static func note(_ line: String) {
        try? FileHandle.standardError.write(contentsOf: Data("\(line)\n".utf8))
    }
}
