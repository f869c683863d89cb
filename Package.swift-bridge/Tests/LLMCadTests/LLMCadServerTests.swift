#if os(macOS) || os(Linux)
import XCTest

@testable import LLMCad

private func serverError(_ server: LLMCadServer) async -> LLMCadServerError? {
    do {
        _ = try await server.start()
        return nil
    } catch {
        return error as? LLMCadServerError
    }
}

/// ``LLMCadServer`` with shell scripts for servers; what must answer is answered by a ``FakeServer``.
final class LLMCadServerTests: XCTestCase {
    /// A configuration that runs `script` with the server's arguments as its own.
    private func configuration(
        _ script: String, port: Int? = nil, log: (@Sendable (String) -> Void)? = nil
    ) -> LLMCadServerConfiguration {
        LLMCadServerConfiguration(
            command: ["/bin/sh", "-c", script, "llmcad-mlx"], port: port, startTimeout: .seconds(60),
            stopGrace: .seconds(20), log: log)
    }

    /// A process that says its number and waits, and a server that answers on its port once it runs.
    private func answering(restarts: Int = 0) throws -> (LLMCadServer, Locked<[FakeServer]>) {
        let port = try LoopbackPort.free()
        let answers = Locked<[FakeServer]>([])
        var configuration = configuration("echo $$ >&2; exec sleep 60", port: port) { _ in
            answers.withLock { answers in
                if answers.isEmpty,
                    let server = try? FakeServer(
                        port: port, { _ in FakeServer.json(200, #"{"status": "ok"}"#) })
                {
                    answers.append(server)
                }
            }
        }
        configuration.maximumRestarts = restarts
        return (LLMCadServer(configuration), answers)
    }

    func testACommandThatIsNotThere() async {
        let absent = LLMCadServer(LLMCadServerConfiguration(command: ["/nowhere/llmcad-mlx"]))
        let error = await serverError(absent)
        XCTAssertEqual(error, .commandNotFound("/nowhere/llmcad-mlx"))
        let unnamed = LLMCadServer(LLMCadServerConfiguration(command: ["no-such-llmcad-mlx"]))
        let second = await serverError(unnamed)
        XCTAssertEqual(second, .commandNotFound("no-such-llmcad-mlx"))
        let state = await unnamed.state
        XCTAssertEqual(state, .stopped)
    }

    func testANameIsLookedUpInPath() throws {
        var configuration = LLMCadServerConfiguration(command: ["sh"])
        configuration.environment["PATH"] = "/nowhere:/bin"
        XCTAssertEqual(try configuration.executable().path, "/bin/sh")
    }

    func testTheKeyTravelsInTheEnvironment() {
        setenv("LLMCAD_MLX_API_KEY", "of-the-parent", 1)
        defer { unsetenv("LLMCAD_MLX_API_KEY") }
        XCTAssertNil(LLMCadServerConfiguration().processEnvironment["LLMCAD_MLX_API_KEY"])
        let keyed = LLMCadServerConfiguration(apiKey: "a-secret-key")
        XCTAssertEqual(keyed.processEnvironment["LLMCAD_MLX_API_KEY"], "a-secret-key")
    }

    func testAServerThatEndsWhileStarting() async {
        let server = LLMCadServer(configuration("echo one >&2; printf two >&2; exit 3"))
        let error = await serverError(server)
        let exit = ServerExit(reason: .exited(code: 3), lastLines: ["one", "two"])
        XCTAssertEqual(error, .exitedWhileStarting(exit))
        XCTAssertEqual(
            error?.localizedDescription,
            "the server ended while starting: exit code 3; its last lines:\none\ntwo")
        let state = await server.state
        XCTAssertEqual(state, .failed(exit))
    }

    func testOnlyTheLastLinesAreKept() async {
        let server = LLMCadServer(configuration("seq 1 1000 >&2; exit 1"))
        guard case .exitedWhileStarting(let exit) = await serverError(server) else {
            return XCTFail("another error")
        }
        XCTAssertEqual(exit.lastLines, (961...1000).map(String.init))
    }

    func testAServerThatNeverAnswersAndIgnoresTheInterruptIsEnded() async throws {
        let lines = Locked<[String]>([])
        var configuration = configuration("trap '' INT; echo $$ >&2; exec sleep 60") { line in
            lines.withLock { $0.append(line) }
        }
        configuration.startTimeout = .milliseconds(500)
        configuration.stopGrace = .milliseconds(200)
        let server = LLMCadServer(configuration)
        let error = await serverError(server)
        XCTAssertEqual(error, .startTimedOut(lastLines: lines.withLock { $0 }))
        let identifier = try XCTUnwrap(lines.withLock { $0.first }.flatMap(Int32.init))
        XCTAssertFalse(isAlive(identifier))
        let state = await server.state
        XCTAssertEqual(state, .stopped)
    }

    func testStartAndStop() async throws {
        let (server, answers) = try answering()
        let client = try await server.start()
        let running = await server.state
        XCTAssertEqual(running, .running(client.endpoint))
        let identifier = await server.processIdentifier
        XCTAssertTrue(isAlive(try XCTUnwrap(identifier)))
        let again = await serverError(server)
        XCTAssertEqual(again, .alreadyStarted)
        await server.stop()
        XCTAssertFalse(isAlive(try XCTUnwrap(identifier)))
        let stopped = await server.state
        XCTAssertEqual(stopped, .stopped)
        XCTAssertTrue(answers.withLock { $0[0] }.requests[0].head.hasPrefix("GET /health "))
    }

    func testTheServerIsToldWhereToListen() async throws {
        var configuration = configuration(#"echo "$*" >&2; exit 1"#, port: try LoopbackPort.free())
        configuration.arguments = ["--memory", "6GB"]
        let port = try XCTUnwrap(configuration.port)
        guard case .exitedWhileStarting(let exit) = await serverError(LLMCadServer(configuration)) else {
            return XCTFail("another error")
        }
        XCTAssertEqual(exit.lastLines, ["serve --host 127.0.0.1 --port \(port) --memory 6GB"])
    }

    func testAPortInUse() async throws {
        let other = try FakeServer { _ in FakeServer.json(200, #"{"status": "ok"}"#) }
        let port = try XCTUnwrap(other.url.port)
        let error = await serverError(LLMCadServer(configuration("exec sleep 60", port: port)))
        XCTAssertEqual(error, .portInUse(port))
    }

    func testCancellingTheStartEndsTheProcess() async throws {
        let lines = Locked<[String]>([])
        let server = LLMCadServer(
            configuration("echo $$ >&2; exec sleep 60") { line in lines.withLock { $0.append(line) } })
        let starting = Task { try await server.start() }
        await eventually("started") { !lines.withLock { $0 }.isEmpty }
        starting.cancel()
        do {
            _ = try await starting.value
            XCTFail("no error")
        } catch {
            XCTAssertTrue(error is CancellationError, "\(error)")
        }
        XCTAssertFalse(isAlive(try XCTUnwrap(lines.withLock { $0.first }.flatMap(Int32.init))))
    }

    func testStoppingWhileStarting() async throws {
        let lines = Locked<[String]>([])
        let server = LLMCadServer(
            configuration("echo $$ >&2; exec sleep 60") { line in lines.withLock { $0.append(line) } })
        let starting = Task { await serverError(server) }
        await eventually("started") { !lines.withLock { $0 }.isEmpty }
        await server.stop()
        let error = await starting.value
        XCTAssertEqual(error, .stoppedWhileStarting)
        let state = await server.state
        XCTAssertEqual(state, .stopped)
    }

    func testACrashIsReported() async throws {
        let (server, _) = try answering()
        _ = try await server.start()
        let identifier = await server.processIdentifier
        let states = await server.states()
        kill(try XCTUnwrap(identifier), SIGKILL)
        var seen: [LLMCadServer.State] = []
        for await state in states {
            seen.append(state)
            if case .failed(let exit) = state {
                XCTAssertEqual(exit.reason, .signalled(SIGKILL))
                XCTAssertEqual(exit.lastLines, [String(try XCTUnwrap(identifier))])
                break
            }
        }
        XCTAssertEqual(seen.count, 2)
        let after = await server.processIdentifier
        XCTAssertNil(after)
    }

    func testACrashedServerIsStartedAgainAsOftenAsAsked() async throws {
        let (server, _) = try answering(restarts: 1)
        let client = try await server.start()
        let states = await server.states()
        var seen: [LLMCadServer.State] = []
        for await state in states {
            seen.append(state)
            if case .running = state {
                let identifier = await server.processIdentifier
                kill(try XCTUnwrap(identifier), SIGKILL)
            }
            if case .failed = state { break }
        }
        let running = LLMCadServer.State.running(client.endpoint)
        XCTAssertEqual(Array(seen.dropLast()), [running, .starting, running])
    }

    func testAServerThatOthersStopIsNotStartedAgain() async throws {
        let port = try LoopbackPort.free()
        let answers = Locked<[FakeServer]>([])
        var configuration = configuration(
            "trap 'exit 0' INT; echo $$ >&2; while :; do sleep 0.05; done", port: port
        ) { _ in
            let server = try? FakeServer(port: port) { _ in FakeServer.json(200, #"{"status": "ok"}"#) }
            answers.withLock { $0 += [server].compactMap { $0 } }
        }
        configuration.maximumRestarts = 5
        let server = LLMCadServer(configuration)
        _ = try await server.start()
        let identifier = await server.processIdentifier
        kill(try XCTUnwrap(identifier), SIGINT)
        await eventually("failed") { if case .failed = await server.state { true } else { false } }
        guard case .failed(let exit) = await server.state else { return XCTFail("not failed") }
        XCTAssertEqual(exit.reason, .exited(code: 0))
    }

    func testTheInterruptReachesAProcessThatATaskStarted() async throws {
        let process = try ServerProcess(
            executable: URL(fileURLWithPath: "/bin/sleep"), arguments: ["60"], environment: [:],
            graceSeconds: 1,
            log: nil)
        await process.end(grace: .seconds(5))
        let exit = await process.exit.value
        XCTAssertEqual(exit.reason, .signalled(SIGINT))
    }

    func testAServerThatIsForgottenIsEnded() async throws {
        var forgotten: (LLMCadServer, Locked<[FakeServer]>)? = try answering()
        _ = try await forgotten?.0.start()
        let identifier = await forgotten?.0.processIdentifier ?? 0
        XCTAssertTrue(isAlive(identifier))
        forgotten = nil
        await eventually("ended") { !isAlive(identifier) }
    }

    func testNoServerIsLeftWhenTheProgramIsKilled() async throws {
        let script = FileManager.default.temporaryDirectory.appendingPathComponent("\(UUID()).sh")
        defer { try? FileManager.default.removeItem(at: script) }
        try "#!/bin/sh\necho $$ >&2\nexec sleep 60\n".write(to: script, atomically: true, encoding: .utf8)
        try FileManager.default.setAttributes([.posixPermissions: 0o700], ofItemAtPath: script.path)
        let program = Process()
        let errors = Pipe()
        program.executableURL = productsFolder.appendingPathComponent("llmcad-example")
        program.arguments = ["--start", script.path, "--verbose", "Hi"]
        program.standardError = errors
        try program.run()
        // The first line is the server's process number, and comes when it is guarded.
        var line = Data()
        while line.last != UInt8(ascii: "\n"), let byte = try errors.fileHandleForReading.read(upToCount: 1),
            !byte.isEmpty
        {
            line.append(byte)
        }
        let identifier = try XCTUnwrap(Int32(String(decoding: line.dropLast(), as: UTF8.self)))
        XCTAssertTrue(isAlive(identifier))
        kill(program.processIdentifier, SIGKILL)
        await eventually("ended") { !isAlive(identifier) }
    }
}

/// Whether a process runs. One that has ended and that nobody has waited for does not.
func isAlive(_ identifier: Int32) -> Bool {
    guard kill(identifier, 0) == 0 else { return false }
    #if os(Linux)
    let status = try? String(contentsOfFile: "/proc/\(identifier)/stat", encoding: .utf8)
    return status?.split(separator: ")").last?.hasPrefix(" Z") == false
    #else
    return true
    #endif
}

/// Where the package's programs were built.
var productsFolder: URL {
    #if os(macOS)
    for bundle in Bundle.allBundles where bundle.bundlePath.hasSuffix(".xctest") {
        return bundle.bundleURL.deletingLastPathComponent()
    }
    #endif
    return URL(fileURLWithPath: CommandLine.arguments[0]).deletingLastPathComponent()
}
#endif
