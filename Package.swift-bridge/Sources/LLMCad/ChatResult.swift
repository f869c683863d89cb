/// A whole answer.
public struct ChatResult: Sendable, Hashable {
    /// The server's name of this answer.
    public let id: String
    /// The model that answered.
    public let model: String
    /// What the model said.
    public let text: String
    /// What it thought before that; empty when it did not think.
    public let reasoning: String
    /// Why it ended.
    public let finishReason: FinishReason
    /// Counts and speculation figures.
    public let usage: Usage
}

/// Why an answer ended.
public struct FinishReason: RawRepresentable, Sendable, Hashable, Codable {
    public let rawValue: String

    public init(rawValue: String) {
        self.rawValue = rawValue
    }

    /// The model ended it, or a stop text came.
    public static let stop = FinishReason(rawValue: "stop")
    /// It reached the most tokens that were allowed.
    public static let length = FinishReason(rawValue: "length")
}

/// Counts of one answer.
public struct Usage: Sendable, Hashable {
    /// Tokens of the conversation.
    public let promptTokens: Int
    /// Tokens of the answer.
    public let completionTokens: Int
    /// Both together.
    public let totalTokens: Int
    /// Prompt tokens taken over from an earlier answer of the conversation.
    public let cachedTokens: Int
    /// What speculation did; `nil` when the server is another one that does not report it.
    public let speculation: SpeculationFigures?
}

/// What speculative decoding did for one answer. Seconds are wall seconds, sizes are bytes.
public struct SpeculationFigures: Sendable, Hashable, Decodable {
    /// Gives the same text again, with the same options.
    public let seed: UInt64
    /// How the draft was used.
    public let policy: ChatOptions.Policy
    /// Where the model runs, for example `gpu` or `cpu`.
    public let device: String
    /// Whether the server emulates slower storage; its times say nothing about the real one then.
    public let emulated: Bool
    /// Passes of the target over all its layers.
    public let targetPasses: Int
    /// Nodes that the draft made.
    public let drafted: Int
    /// Nodes that were sent to the target.
    public let tested: Int
    /// Draft tokens that became output.
    public let accepted: Int
    /// Generated tokens per target pass, the target's own token included.
    public let tokensPerPass: Double
    /// Accepted tokens / tokens tested on the target's own path.
    public let acceptanceRate: Double
    /// Reading the conversation.
    public let promptSeconds: Double
    /// Making the answer: drafting, verifying, waiting and the rest.
    public let decodeSeconds: Double
    /// Generated tokens per second of decoding.
    public let tokensPerSecond: Double
    /// Drafting.
    public let draftSeconds: Double
    /// Passes of the target.
    public let verifySeconds: Double
    /// Waiting for weights from the disk.
    public let ioWaitSeconds: Double
    /// Decoding outside all that.
    public let otherSeconds: Double
    /// Weights read from the disk for the target's passes.
    public let streamedBytes: Int
    /// The memory budget; `nil`: none was set.
    public let budgetBytes: Int?
    /// Weights kept in memory.
    public let pinnedBytes: Int
    /// Most memory the server's process ever had.
    public let peakRSSBytes: Int
    /// Most memory that MLX ever had.
    public let peakMLXBytes: Int

    private enum CodingKeys: String, CodingKey {
        case seed, policy, device, emulated, drafted, tested, accepted
        case targetPasses = "target_passes"
        case tokensPerPass = "tokens_per_pass"
        case acceptanceRate = "acceptance_rate"
        case promptSeconds = "prompt_s"
        case decodeSeconds = "decode_s"
        case tokensPerSecond = "tokens_per_s"
        case draftSeconds = "draft_s"
        case verifySeconds = "verify_s"
        case ioWaitSeconds = "io_wait_s"
        case otherSeconds = "other_s"
        case streamedBytes = "streamed_bytes"
        case budgetBytes = "budget_bytes"
        case pinnedBytes = "pinned_bytes"
        case peakRSSBytes = "peak_rss_bytes"
        case peakMLXBytes = "peak_mlx_bytes"
    }
}

extension Usage: Decodable {
    private enum CodingKeys: String, CodingKey {
        case speculation
        case promptTokens = "prompt_tokens"
        case completionTokens = "completion_tokens"
        case totalTokens = "total_tokens"
        case promptDetails = "prompt_tokens_details"
    }

    private struct PromptDetails: Decodable {
        let cached_tokens: Int?
    }

    public init(from decoder: any Decoder) throws {
        let usage = try decoder.container(keyedBy: CodingKeys.self)
        promptTokens = try usage.decode(Int.self, forKey: .promptTokens)
        completionTokens = try usage.decode(Int.self, forKey: .completionTokens)
        totalTokens = try usage.decode(Int.self, forKey: .totalTokens)
        cachedTokens = try usage.decodeIfPresent(PromptDetails.self, forKey: .promptDetails)?.cached_tokens ?? 0
        speculation = try usage.decodeIfPresent(SpeculationFigures.self, forKey: .speculation)
    }
}

extension ChatResult: Decodable {
    private enum CodingKeys: String, CodingKey {
        case id, model, choices, usage
    }

    private struct Choice: Decodable {
        struct Message: Decodable {
            let content: String?
            let reasoning: String?
        }

        let message: Message
        let finish_reason: FinishReason
    }

    public init(from decoder: any Decoder) throws {
        let answer = try decoder.container(keyedBy: CodingKeys.self)
        let choices = try answer.decode([Choice].self, forKey: .choices)
        guard let choice = choices.first else {
            throw DecodingError.dataCorruptedError(
                forKey: .choices, in: answer, debugDescription: "an answer without a choice")
        }
        id = try answer.decode(String.self, forKey: .id)
        model = try answer.decode(String.self, forKey: .model)
        text = choice.message.content ?? ""
        reasoning = choice.message.reasoning ?? ""
        finishReason = choice.finish_reason
        usage = try answer.decode(Usage.self, forKey: .usage)
    }
}
