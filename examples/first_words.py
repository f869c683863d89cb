"""First words: load the embedded model, stream an answer, look at the figures.

python examples/first_words.py "Why is the sky blue?"
"""

from __future__ import annotations

import sys

from llmcad_mlx import load


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "Name three things that float on water."
    with load(progress=True) as engine:
        stats = None
        for response in engine.stream_generate([{"role": "user", "content": question}], max_tokens=80):
            print(response.text, end="", flush=True)
            stats = response.stats
    if stats is not None:
        print(
            f"\n{stats.generated_tokens} tokens in {stats.target_passes} passes of the target: "
            f"{stats.tokens_per_s:.1f} tokens/s"
        )


if __name__ == "__main__":
    main()
