#if os(macOS) || os(Linux)
import Foundation

/// A small shell process that ends another one when this program dies, however it dies.
///
/// It waits on a pipe whose other end this program holds: the system closes that end when the program is gone.
final class OrphanGuard: Sendable {
    private static let script = """
        trap '' INT HUP
        read -r _
        kill -INT "$1" 2>/dev/null || exit 0
        seconds=0
        while [ "$seconds" -lt "$2" ] && kill -0 "$1" 2>/dev/null; do
            sleep 1
            seconds=$((seconds + 1))
        done
        kill -KILL "$1" 2>/dev/null
        """

    private let shell: Locked<Process>
    private let lifeline: Locked<FileHandle>

    /// `nil` when the system starts no further process; the guarded one runs all the same.
    init?(of identifier: Int32, graceSeconds: Int) {
        let shell = Process()
        let pipe = Pipe()
        shell.executableURL = URL(fileURLWithPath: "/bin/sh")
        shell.arguments = ["-c", Self.script, "llmcad-orphan-guard", String(identifier), String(graceSeconds)]
        shell.standardInput = pipe
        shell.standardOutput = FileHandle.nullDevice
        shell.standardError = FileHandle.nullDevice
        let lifeline = pipe.fileHandleForWriting
        // No other process that this program starts may hold the pipe open.
        _ = fcntl(lifeline.fileDescriptor, F_SETFD, FD_CLOEXEC)
        do {
            try shell.runWithSignals()
        } catch {
            return nil
        }
        self.shell = Locked(shell)
        self.lifeline = Locked(lifeline)
    }

    /// Ends the guard: the guarded process has ended.
    func dismiss() {
        // First the shell, then the pipe: closing the pipe would make it send its signals.
        shell.withLock { $0.send(SIGKILL) }
        lifeline.withLock { try? $0.close() }
    }
}
#endif
