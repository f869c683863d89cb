#if os(macOS) || os(Linux)
import Foundation

extension Process {
    /// Starts the process with no signal blocked.
    ///
    /// Swift's tasks run on threads that block most signals, and a child inherits that: Ctrl-C and `SIGTERM` would
    /// never reach it.
    func runWithSignals() throws {
        var none = sigset_t()
        sigemptyset(&none)
        var before = sigset_t()
        pthread_sigmask(SIG_SETMASK, &none, &before)
        defer { pthread_sigmask(SIG_SETMASK, &before, nil) }
        try run()
    }

    /// Sends a signal, unless the process has ended: its number may belong to another one then.
    func send(_ signal: Int32) {
        if isRunning {
            _ = kill(processIdentifier, signal)
        }
    }
}
#endif
