import Foundation

/// What was asked for on the command line.
struct Arguments {
    static let usage = """
        usage: llmcad-example [options] PROMPT

        Asks a llmcad-mlx server, prints the answer as it is made and tints what the draft proposed.

          --url URL          the server's address (default http://127.0.0.1:8080)
          --key KEY          its API key (default: $LLMCAD_MLX_API_KEY)
          --max-tokens N     length of the answer (default 256)
          --rounds           also print how each round's token tree was judged
          --start COMMAND    start this llmcad-mlx on a free port first, and stop it at the end (macOS, Linux)
          --with OPTION      an option for the server to start; repeat for more, each word apart
          --verbose          show what the started server logs
        """

    var url = "http://127.0.0.1:8080"
    var key = ProcessInfo.processInfo.environment["LLMCAD_MLX_API_KEY"]
    var maxTokens = 256
    var rounds = false
    var start: String?
    var serverOptions: [String] = []
    var verbose = false
    var prompt = ""

    struct Problem: Error {
        let message: String
    }

    init(_ words: [String]) throws {
        var words = words[...]
        func value(of option: String) throws -> String {
            guard let value = words.popFirst() else { throw Problem(message: "\(option) needs a value") }
            return value
        }
        var prompts: [String] = []
        while let word = words.popFirst() {
            switch word {
            case "--url": url = try value(of: word)
            case "--key": key = try value(of: word)
            case "--max-tokens":
                guard let number = Int(try value(of: word)), number > 0 else {
                    throw Problem(message: "--max-tokens needs a number of 1 or more")
                }
                maxTokens = number
            case "--rounds": rounds = true
            case "--start": start = try value(of: word)
            case "--with": serverOptions.append(try value(of: word))
            case "--verbose": verbose = true
            case "--":
                prompts += words
                words = []
            case _ where word.hasPrefix("-"): throw Problem(message: "unknown option \(word)")
            default: prompts.append(word)
            }
        }
        guard prompts.count == 1, let only = prompts.first else {
            throw Problem(message: prompts.isEmpty ? "a prompt is missing" : "give one prompt, in quotation marks")
        }
        prompt = only
    }
}
