/// Answers as the server writes them.
enum Samples {
    static let figures = """
        {"seed": 7, "policy": "throughput", "device": "cpu", "emulated": false, "target_passes": 3, "drafted": 20, \
        "tested": 12, "accepted": 5, "tokens_per_pass": 2.5, "acceptance_rate": 0.625, "prompt_s": 0.25, \
        "decode_s": 0.5, "tokens_per_s": 16.0, "draft_s": 0.125, "verify_s": 0.25, "io_wait_s": 0.0625, \
        "other_s": 0.0625, "streamed_bytes": 1000000, "budget_bytes": null, "pinned_bytes": 5, \
        "peak_rss_bytes": 6, "peak_mlx_bytes": 7}
        """

    static let usage = """
        {"prompt_tokens": 10, "completion_tokens": 8, "total_tokens": 18, \
        "prompt_tokens_details": {"cached_tokens": 4}, "speculation": \(figures)}
        """

    static let answer = """
        {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, \
        "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}], "usage": \(usage)}
        """

    static let round = """
        {"index": 0, "nodes": [{"id": 1, "text": "a", "parent": -1, "confidence": 1.0, "source": "target", \
        "state": "root"}, {"id": 2, "text": "b", "parent": 0, "confidence": 0.5, "source": "ngram", \
        "state": "accepted"}], "bonus": {"id": 3, "text": "c"}, "tokens_per_s": 4.5, "tokens_per_pass": 1.5, \
        "peak_rss_bytes": 100, "budget_bytes": 200}
        """

    /// A chunk with text, and what else is given at the top level.
    static func chunk(_ text: String, _ extra: String = "") -> String {
        #"{"id": "c", "choices": [{"index": 0, "delta": {"content": "\#(text)"}, "finish_reason": null}]\#(extra)}"#
    }

    static let last = #"{"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}"#
    static let usageChunk = #"{"id": "c", "choices": [], "usage": \#(usage)}"#

    /// A whole stream of two texts.
    static let stream = [chunk("Hel"), chunk("lo"), last, usageChunk, "[DONE]"].map { "data: \($0)\n\n" }
}
