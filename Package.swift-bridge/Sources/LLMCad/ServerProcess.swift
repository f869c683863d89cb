#if os(macOS) || os(Linux)
import Foundation

/// How a server's process ended.
public struct ServerExit: Sendable, Hashable {
    /// What ended it.
    public enum Reason: Sendable, Hashable {
        /// It ended by itself, with this exit code.
        case exited(code: Int32)
        /// A signal ended it.
        case signalled(Int32)
    }

    /// What ended it.
    public let reason: Reason
    /// The last lines it wrote to standard error, oldest first.
    public let lastLines: [String]
}

extension ServerExit: CustomStringConvertible {
    /// How it ended, with its last lines.
    public var description: String {
        let how =
            switch reason {
            case .exited(let code): "exit code \(code)"
            case .signalled(let signal): "ended by signal \(signal)"
            }
        return lastLines.isEmpty ? how : "\(how); its last lines:\n\(lastLines.joined(separator: "\n"))"
    }
}

/// One started process: its standard error line by line, its end, and a guard that ends it when this program dies.
final class ServerProcess: Sendable {
    private static let keptLines = 40
    /// A reader of standard error that a child of the server keeps open is not waited for longer than this.
    private static let lastLinesTimeout = DispatchTimeInterval.seconds(1)

    /// How it ended. May be awaited by many.
    let exit: Task<ServerExit, Never>
    let identifier: Int32
    private let process: Locked<Process>
    private let orphanGuard: OrphanGuard?
    private let lines: Locked<[String]>

    /// The last lines of standard error so far.
    var lastLines: [String] {
        lines.withLock { $0 }
    }

    /// Starts `executable`.
    ///
    /// - Throws: Foundation's error when the system cannot start it.
    init(
        executable: URL,
        arguments: [String],
        environment: [String: String],
        graceSeconds: Int,
        log: (@Sendable (String) -> Void)?
    ) throws {
        let process = Process()
        let errors = Pipe()
        process.executableURL = executable
        process.arguments = arguments
        process.environment = environment
        process.standardInput = FileHandle.nullDevice
        process.standardOutput = FileHandle.nullDevice
        process.standardError = errors

        let lines = Locked<[String]>([])
        let linesEnded = DispatchSemaphore(value: 0)
        let (exits, continuation) = AsyncStream<ServerExit>.makeStream()
        process.terminationHandler = { process in
            let reason: ServerExit.Reason =
                process.terminationReason == .exit
                ? .exited(code: process.terminationStatus) : .signalled(process.terminationStatus)
            // Not here: Foundation watches all processes on the thread that calls this.
            DispatchQueue.global().async {
                _ = linesEnded.wait(timeout: .now() + Self.lastLinesTimeout)
                continuation.yield(ServerExit(reason: reason, lastLines: lines.withLock { $0 }))
                continuation.finish()
            }
        }
        try process.runWithSignals()
        let orphanGuard = OrphanGuard(of: process.processIdentifier, graceSeconds: graceSeconds)
        self.process = Locked(process)
        self.lines = lines
        self.orphanGuard = orphanGuard
        identifier = process.processIdentifier
        exit = Task {
            var last = ServerExit(reason: .exited(code: 0), lastLines: [])
            for await exit in exits { last = exit }
            orphanGuard?.dismiss()
            return last
        }
        Self.read(errors.fileHandleForReading, ended: linesEnded) { line in
            lines.withLock { kept in
                kept.append(line)
                kept.removeFirst(max(0, kept.count - Self.keptLines))
            }
            log?(line)
        }
    }

    /// How it ended. Unlike ``exit``'s value, the wait itself can be cancelled.
    ///
    /// - Throws: `CancellationError`.
    func waitForExit() async throws -> ServerExit {
        let (exits, continuation) = AsyncStream<ServerExit>.makeStream()
        Task {
            continuation.yield(await exit.value)
            continuation.finish()
        }
        for await exit in exits { return exit }
        throw CancellationError()
    }

    /// Asks it to end as Ctrl-C does, after `grace` ends it at once, and returns when it has ended.
    func end(grace: Duration) async {
        process.withLock { $0.send(SIGINT) }
        // Not a child task: cancelling the caller must not shorten the grace.
        let lastResort = Task {
            try await Task.sleep(for: grace)
            process.withLock { $0.send(SIGKILL) }
        }
        _ = await exit.value
        lastResort.cancel()
    }

    /// Reads lines on a thread of its own until the end. (A `readabilityHandler` is not told of the end on Linux, and
    /// tearing it down can crash there.)
    private static func read(
        _ handle: FileHandle, ended: DispatchSemaphore, report: @escaping @Sendable (String) -> Void
    ) {
        let handle = Locked(handle)
        let reader = Thread {
            var rest = Data()
            while true {
                let data = handle.withLock { $0.availableData }
                if data.isEmpty { break }
                rest.append(data)
                while let end = rest.firstIndex(of: UInt8(ascii: "\n")) {
                    report(String(decoding: rest[..<end], as: UTF8.self))
                    rest = Data(rest[(end + 1)...])
                }
            }
            if !rest.isEmpty {
                report(String(decoding: rest, as: UTF8.self))
            }
            ended.signal()
        }
        reader.name = "llmcad-server-errors"
        reader.start()
    }
}
#endif
