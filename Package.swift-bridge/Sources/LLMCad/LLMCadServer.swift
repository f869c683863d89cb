#if os(macOS) || os(Linux)
import Foundation

/// Starts, watches and stops a `llmcad-mlx serve` on this computer.
///
/// ```swift
/// let server = LLMCadServer(.init(command: ["/opt/llmcad/bin/llmcad-mlx"], arguments: ["--memory", "6GB"]))
/// let client = try await server.start()
/// let answer = try await client.chat([.user("Hello")])
/// await server.stop()
/// ```
///
/// The server listens on 127.0.0.1 only. It ends with ``stop()``, and also when this program ends or is killed.
public actor LLMCadServer {
    /// What the server is doing.
    public enum State: Sendable, Hashable {
        /// Not started, or stopped.
        case stopped
        /// Loading its model.
        case starting
        /// Answering at this address.
        case running(URL)
        /// Ended by itself, and not to be started again.
        case failed(ServerExit)
    }

    /// How it is started.
    public let configuration: LLMCadServerConfiguration
    /// What the server is doing now.
    public private(set) var state = State.stopped {
        didSet {
            for watcher in watchers.values { watcher.yield(state) }
        }
    }

    private var process: ServerProcess?
    private var watch: Task<Void, Never>?
    private var restartsLeft = 0
    /// Counts calls of ``stop()``, so that a start notices that it was overtaken.
    private var stops = 0
    private var watchers: [UUID: AsyncStream<State>.Continuation] = [:]

    /// A server that is not started yet.
    public init(_ configuration: LLMCadServerConfiguration = LLMCadServerConfiguration()) {
        self.configuration = configuration
    }

    deinit {
        watch?.cancel()
        for watcher in watchers.values { watcher.finish() }
        if let process {
            let grace = configuration.stopGrace
            Task.detached { await process.end(grace: grace) }
        }
    }

    /// The number of the server's process while there is one.
    public var processIdentifier: Int32? {
        process?.identifier
    }

    /// The last lines that the server wrote to standard error, oldest first.
    public var lastLines: [String] {
        process?.lastLines ?? []
    }

    /// Starts the server and waits until it answers.
    ///
    /// Cancelling the task stops the server again.
    ///
    /// - Returns: A client of it, which stays good when the server is started again after a crash.
    /// - Throws: ``LLMCadServerError``, or `CancellationError`.
    public func start() async throws -> LLMCadClient {
        switch state {
        case .starting, .running: throw LLMCadServerError.alreadyStarted
        case .stopped, .failed: break
        }
        let stopsBefore = stops
        state = .starting
        restartsLeft = configuration.maximumRestarts
        do {
            let port = try configuration.port ?? LoopbackPort.free()
            guard LoopbackPort.isFree(port), let endpoint = URL(string: "http://127.0.0.1:\(port)") else {
                throw LLMCadServerError.portInUse(port)
            }
            let client = LLMCadClient(endpoint: endpoint, apiKey: configuration.apiKey)
            try await run(at: endpoint, port: port)
            return client
        } catch {
            guard stops == stopsBefore else { throw LLMCadServerError.stoppedWhileStarting }
            await end()
            if case LLMCadServerError.exitedWhileStarting(let exit) = error {
                state = .failed(exit)
            } else {
                state = .stopped
            }
            throw error
        }
    }

    /// Stops the server and returns when its process has ended: first as Ctrl-C does, and after
    /// ``LLMCadServerConfiguration/stopGrace`` at once.
    public func stop() async {
        stops += 1
        await end()
        state = .stopped
    }

    /// The state now, and each one that follows.
    public func states() -> AsyncStream<State> {
        let (states, continuation) = AsyncStream<State>.makeStream()
        let key = UUID()
        continuation.yield(state)
        continuation.onTermination = { [weak self] _ in
            Task { await self?.forget(key) }
        }
        watchers[key] = continuation
        return states
    }

    private func forget(_ watcher: UUID) {
        watchers[watcher] = nil
    }

    /// Launches the process, waits until it answers and watches it from then on.
    private func run(at endpoint: URL, port: Int) async throws {
        let process = try launch(port: port)
        self.process = process
        try await waitUntilHealthy(process, endpoint)
        // A stop or a cancelled task may have come between the answer and now.
        try Task.checkCancellation()
        guard self.process === process else { throw CancellationError() }
        state = .running(endpoint)
        watch = Task { [weak self] in
            let exit = await process.exit.value
            if !Task.isCancelled {
                await self?.serverExited(exit, endpoint, port)
            }
        }
    }

    private func launch(port: Int) throws -> ServerProcess {
        let executable = try configuration.executable()
        let before = Array(configuration.command.dropFirst())
        let serve = ["serve", "--host", "127.0.0.1", "--port", String(port)]
        do {
            return try ServerProcess(
                executable: executable,
                arguments: before + serve + configuration.arguments,
                environment: configuration.processEnvironment,
                graceSeconds: Int(configuration.stopGrace.components.seconds),
                log: configuration.log)
        } catch {
            throw LLMCadServerError.cannotStart(command: executable.path, reason: error.localizedDescription)
        }
    }

    private func waitUntilHealthy(_ process: ServerProcess, _ endpoint: URL) async throws {
        let timeout = configuration.startTimeout
        try await withThrowingTaskGroup(of: Void.self) { group in
            group.addTask {
                let client = LLMCadClient(endpoint: endpoint, timeout: 5)
                while (try? await client.health()) == nil {
                    try await Task.sleep(for: .milliseconds(100))
                }
            }
            group.addTask {
                try await Task.sleep(for: timeout)
                throw LLMCadServerError.startTimedOut(lastLines: process.lastLines)
            }
            group.addTask {
                throw LLMCadServerError.exitedWhileStarting(try await process.waitForExit())
            }
            defer { group.cancelAll() }
            _ = try await group.next()
        }
    }

    /// Runs in the `watch` task: ``stop()`` cancels it.
    private func serverExited(_ exit: ServerExit, _ endpoint: URL, _ port: Int) async {
        guard !Task.isCancelled else { return }
        var lastExit = exit
        process = nil
        // Exit code 0: somebody else asked it to end.
        while restartsLeft > 0, lastExit.reason != .exited(code: 0) {
            restartsLeft -= 1
            state = .starting
            do {
                try await Task.sleep(for: .milliseconds(500))
                return try await run(at: endpoint, port: port)
            } catch LLMCadServerError.exitedWhileStarting(let exit) {
                lastExit = exit
            } catch {
                await process?.end(grace: configuration.stopGrace)
            }
            guard !Task.isCancelled else { return }
            process = nil
        }
        state = .failed(lastExit)
    }

    /// Ends the process, if there is one, and waits for its end.
    private func end() async {
        watch?.cancel()
        watch = nil
        guard let process else { return }
        await process.end(grace: configuration.stopGrace)
        if self.process === process {
            self.process = nil
        }
    }
}
#endif
