#if os(macOS) || os(Linux)
import Foundation

/// How a local server is started.
public struct LLMCadServerConfiguration: Sendable {
    /// The program and what stands before `serve`. A name without `/` is looked up in `PATH`; an app that is started
    /// from the Finder has a short one, so give it the whole path.
    public var command: [String]
    /// Options of `llmcad-mlx serve`, for example `["--target", "qwen3-8b", "--memory", "6GB"]`.
    public var arguments: [String]
    /// Variables added to this program's own environment.
    public var environment: [String: String]
    /// Where to listen on 127.0.0.1; `nil`: any free port.
    public var port: Int?
    /// A key that the server asks for, at least 8 printable ASCII characters. It travels in the environment, where
    /// other users of the computer cannot read it. `nil`: none.
    public var apiKey: String?
    /// How long the server may take until it answers. The first start of a model that is not on this computer
    /// downloads it; `llmcad-mlx pull` does that beforehand.
    public var startTimeout: Duration
    /// How long the server may take to end when asked, before it is ended at once.
    public var stopGrace: Duration
    /// How often the server is started again after a crash: in all, until ``LLMCadServer/stop()``.
    public var maximumRestarts: Int
    /// Called with each line that the server writes to standard error, on a thread of its own.
    public var log: (@Sendable (String) -> Void)?

    /// A configuration; what is left out has the defaults shown.
    public init(
        command: [String] = ["llmcad-mlx"],
        arguments: [String] = [],
        environment: [String: String] = [:],
        port: Int? = nil,
        apiKey: String? = nil,
        startTimeout: Duration = .seconds(300),
        stopGrace: Duration = .seconds(10),
        maximumRestarts: Int = 0,
        log: (@Sendable (String) -> Void)? = nil
    ) {
        self.command = command
        self.arguments = arguments
        self.environment = environment
        self.port = port
        self.apiKey = apiKey
        self.startTimeout = startTimeout
        self.stopGrace = stopGrace
        self.maximumRestarts = maximumRestarts
        self.log = log
    }
}

extension LLMCadServerConfiguration {
    /// The server's environment: an API key that this program happens to have is not handed on.
    var processEnvironment: [String: String] {
        var variables = ProcessInfo.processInfo.environment.merging(environment) { _, added in added }
        variables["LLMCAD_MLX_API_KEY"] = apiKey
        return variables
    }

    /// The file to start.
    ///
    /// - Throws: ``LLMCadServerError/commandNotFound(_:)``.
    func executable() throws -> URL {
        let name = command.first ?? ""
        let folders =
            name.contains("/")
            ? [""] : (processEnvironment["PATH"] ?? "").split(separator: ":").map { "\($0)/" }
        for path in folders.map({ $0 + name }) where FileManager.default.isExecutableFile(atPath: path) {
            return URL(fileURLWithPath: path)
        }
        throw LLMCadServerError.commandNotFound(name)
    }
}

/// Why a local server could not be started.
public enum LLMCadServerError: Error, Sendable, Hashable {
    /// There is no such program.
    case commandNotFound(String)
    /// The system refused to start the program.
    case cannotStart(command: String, reason: String)
    /// It is starting or running already.
    case alreadyStarted
    /// Another program listens on the port.
    case portInUse(Int)
    /// The system gives no port.
    case noFreePort
    /// The server ended before it answered.
    case exitedWhileStarting(ServerExit)
    /// The server did not answer in time, and was stopped.
    case startTimedOut(lastLines: [String])
    /// ``LLMCadServer/stop()`` was called before the server answered.
    case stoppedWhileStarting
}

extension LLMCadServerError: LocalizedError {
    /// What happened and, where it can be told, what to do.
    public var errorDescription: String? {
        switch self {
        case .commandNotFound(let name):
            "\(name.isEmpty ? "the command" : name) was not found; give the whole path of llmcad-mlx"
        case .cannotStart(let command, let reason):
            "\(command) could not be started: \(reason)"
        case .alreadyStarted:
            "the server has been started already"
        case .portInUse(let port):
            "port \(port) is in use; give another, or none to take any that is free"
        case .noFreePort:
            "the system gives no free port"
        case .exitedWhileStarting(let exit):
            "the server ended while starting: \(exit)"
        case .startTimedOut(let lines) where lines.isEmpty:
            "the server did not answer in time"
        case .startTimedOut(let lines):
            "the server did not answer in time; its last lines:\n\(lines.joined(separator: "\n"))"
        case .stoppedWhileStarting:
            "the server was stopped while starting"
        }
    }
}
#endif
