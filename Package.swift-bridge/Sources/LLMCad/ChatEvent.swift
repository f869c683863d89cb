/// What a stream of an answer brings, in the order in which the server makes it.
public enum ChatEvent: Sendable, Hashable {
    /// The token tree of a round, before the text that came of it. Only with ``StreamDetails/rounds``.
    case round(SpeculationRound)
    /// A piece of what the model thinks before it answers. `tokens` is empty without ``StreamDetails/tokens``.
    case reasoning(String, tokens: [GeneratedToken])
    /// A piece of text. `tokens` is empty without ``StreamDetails/tokens``.
    case text(String, tokens: [GeneratedToken])
    /// The answer is complete. The last event, and the only sign of a complete answer.
    case finished(FinishReason, usage: Usage?)
}

/// One token of the answer.
public struct GeneratedToken: Sendable, Hashable, Decodable {
    /// Its number in the model's vocabulary.
    public let id: Int
    /// The text it added; empty while a character is not complete.
    public let text: String
    /// Whether the draft proposed it and the target accepted it; otherwise the target made it.
    public let fromDraft: Bool

    private enum CodingKeys: String, CodingKey {
        case id, text
        case fromDraft = "from_draft"
    }
}

/// One round of speculation: a tree of tokens was drafted and checked by one pass of the target.
public struct SpeculationRound: Sendable, Hashable, Decodable {
    /// Counts the rounds of an answer from 0.
    public let index: Int
    /// The tree, each parent before its children.
    public let nodes: [TreeNode]
    /// The target's own token after the accepted path.
    public let bonus: BonusToken?
    /// Generated tokens per second so far.
    public let tokensPerSecond: Double
    /// Generated tokens per target pass so far.
    public let tokensPerPass: Double
    /// Most memory the server's process ever had.
    public let peakRSSBytes: Int
    /// The memory budget; `nil`: none was set.
    public let budgetBytes: Int?

    private enum CodingKeys: String, CodingKey {
        case index, nodes, bonus
        case tokensPerSecond = "tokens_per_s"
        case tokensPerPass = "tokens_per_pass"
        case peakRSSBytes = "peak_rss_bytes"
        case budgetBytes = "budget_bytes"
    }
}

/// The target's own token of a round.
public struct BonusToken: Sendable, Hashable, Decodable {
    /// Its number in the model's vocabulary.
    public let id: Int
    /// What it stands for.
    public let text: String
}

/// One node of a round's token tree.
public struct TreeNode: Sendable, Hashable, Decodable {
    /// What proposed the token.
    public struct Source: RawRepresentable, Sendable, Hashable, Codable {
        public let rawValue: String

        public init(rawValue: String) {
            self.rawValue = rawValue
        }

        /// The draft model.
        public static let model = Source(rawValue: "model")
        /// Text that the conversation already holds.
        public static let ngram = Source(rawValue: "ngram")
        /// A table of the target's own text.
        public static let table = Source(rawValue: "table")
        /// The target.
        public static let target = Source(rawValue: "target")
    }

    /// What became of the token.
    public struct State: RawRepresentable, Sendable, Hashable, Codable {
        public let rawValue: String

        public init(rawValue: String) {
            self.rawValue = rawValue
        }

        /// Part of the answer.
        public static let accepted = State(rawValue: "accepted")
        /// The target chose another token.
        public static let rejected = State(rawValue: "rejected")
        /// Drafted, but not sent to the target in this round.
        public static let provisional = State(rawValue: "provisional")
        /// The last token before the round.
        public static let root = State(rawValue: "root")
    }

    /// The token's number in the model's vocabulary.
    public let id: Int
    /// What it stands for.
    public let text: String
    /// Index of the parent in ``SpeculationRound/nodes``; -1 for the root.
    public let parent: Int
    /// The draft's probability of the token after its parent, 0 to 1.
    public let confidence: Double
    /// What proposed it.
    public let source: Source
    /// What became of it.
    public let state: State
}
