/// How an answer is generated. What is `nil` is left to the server's defaults.
///
/// The server checks every value; one out of range is refused with ``LLMCadError/badRequest(message:param:)``.
public struct ChatOptions: Sendable, Hashable {
    /// How the draft is used. The text does not depend on it.
    public struct Policy: RawRepresentable, Sendable, Hashable, Codable {
        public let rawValue: String

        public init(rawValue: String) {
            self.rawValue = rawValue
        }

        /// Measures and adapts; the server's default.
        public static let throughput = Policy(rawValue: "throughput")
        /// The LLMCad paper's rule.
        public static let paper = Policy(rawValue: "paper")
        /// Drafts a line of tokens instead of a tree.
        public static let chain = Policy(rawValue: "chain")
        /// Does not draft.
        public static let plain = Policy(rawValue: "plain")
    }

    /// A name from ``LLMCadClient/models()``; `nil`: the model that the server runs.
    public var model: String?
    /// Most tokens of the answer.
    public var maxTokens: Int?
    /// 0: always the most likely token.
    public var temperature: Double?
    /// Tokens are drawn from the smallest set with at least this probability.
    public var topP: Double?
    /// Tokens are drawn from the most likely `topK`; 0: no limit.
    public var topK: Int?
    /// Tokens less likely than this share of the most likely one are left out.
    public var minP: Double?
    /// The same seed and options give the same text.
    public var seed: UInt64?
    /// Texts that end the answer; they are not part of it.
    public var stop: [String]
    /// Taken off the logits of tokens that occurred lately.
    public var presencePenalty: Double?
    /// The same, for each time a token occurred.
    public var frequencyPenalty: Double?
    /// Divides the logits of tokens that occurred lately.
    public var repetitionPenalty: Double?
    /// Added to the logits of token ids.
    public var logitBias: [Int: Double]
    /// How the draft is used.
    public var policy: Policy?
    /// Nodes sent to the target in each pass, the root included; `nil`: the policy chooses.
    public var treeNodes: Int?

    /// Options; what is left out is left to the server.
    public init(
        model: String? = nil,
        maxTokens: Int? = nil,
        temperature: Double? = nil,
        topP: Double? = nil,
        topK: Int? = nil,
        minP: Double? = nil,
        seed: UInt64? = nil,
        stop: [String] = [],
        presencePenalty: Double? = nil,
        frequencyPenalty: Double? = nil,
        repetitionPenalty: Double? = nil,
        logitBias: [Int: Double] = [:],
        policy: Policy? = nil,
        treeNodes: Int? = nil
    ) {
        self.model = model
        self.maxTokens = maxTokens
        self.temperature = temperature
        self.topP = topP
        self.topK = topK
        self.minP = minP
        self.seed = seed
        self.stop = stop
        self.presencePenalty = presencePenalty
        self.frequencyPenalty = frequencyPenalty
        self.repetitionPenalty = repetitionPenalty
        self.logitBias = logitBias
        self.policy = policy
        self.treeNodes = treeNodes
    }
}

/// What a stream reports besides text.
public struct StreamDetails: OptionSet, Sendable, Hashable {
    public let rawValue: Int

    public init(rawValue: Int) {
        self.rawValue = rawValue
    }

    /// The tokens of each text, with whether the draft proposed them.
    public static let tokens = StreamDetails(rawValue: 1)
    /// The token tree of each round: ``ChatEvent/round(_:)``.
    public static let rounds = StreamDetails(rawValue: 2)
}
