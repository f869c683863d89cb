/// The body of `POST /v1/chat/completions`.
struct ChatRequest: Encodable {
    let messages: [ChatMessage]
    let options: ChatOptions
    /// `nil`: the answer comes in one piece.
    let stream: StreamDetails?

    private struct StreamOptions: Encodable {
        let include_usage = true
    }

    private struct Speculation: Encodable {
        let tokens: Bool
        let trees: Bool
    }

    private enum Key: String, CodingKey {
        case model, messages, temperature, seed, stop, stream, policy, speculation
        case maxTokens = "max_tokens"
        case topP = "top_p"
        case topK = "top_k"
        case minP = "min_p"
        case presencePenalty = "presence_penalty"
        case frequencyPenalty = "frequency_penalty"
        case repetitionPenalty = "repetition_penalty"
        case logitBias = "logit_bias"
        case treeNodes = "tree_nodes"
        case streamOptions = "stream_options"
    }

    func encode(to encoder: any Encoder) throws {
        var body = encoder.container(keyedBy: Key.self)
        try body.encode(messages, forKey: .messages)
        try body.encodeIfPresent(options.model, forKey: .model)
        try body.encodeIfPresent(options.maxTokens, forKey: .maxTokens)
        try body.encodeIfPresent(options.temperature, forKey: .temperature)
        try body.encodeIfPresent(options.topP, forKey: .topP)
        try body.encodeIfPresent(options.topK, forKey: .topK)
        try body.encodeIfPresent(options.minP, forKey: .minP)
        try body.encodeIfPresent(options.seed, forKey: .seed)
        try body.encodeIfPresent(options.presencePenalty, forKey: .presencePenalty)
        try body.encodeIfPresent(options.frequencyPenalty, forKey: .frequencyPenalty)
        try body.encodeIfPresent(options.repetitionPenalty, forKey: .repetitionPenalty)
        try body.encodeIfPresent(options.policy, forKey: .policy)
        try body.encodeIfPresent(options.treeNodes, forKey: .treeNodes)
        if !options.stop.isEmpty {
            try body.encode(options.stop, forKey: .stop)
        }
        if !options.logitBias.isEmpty {
            // Swift encodes a dictionary with integer keys as an object with them as strings, as OpenAI has it.
            try body.encode(options.logitBias, forKey: .logitBias)
        }
        if let stream {
            try body.encode(true, forKey: .stream)
            try body.encode(StreamOptions(), forKey: .streamOptions)
            if !stream.isEmpty {
                let speculation = Speculation(tokens: stream.contains(.tokens), trees: stream.contains(.rounds))
                try body.encode(speculation, forKey: .speculation)
            }
        }
    }
}
