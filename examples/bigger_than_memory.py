"""Bigger than memory: only a part of the target stays in memory, the rest is read from the disk on every pass.

python examples/bigger_than_memory.py 800MB 30MB     the whole process's budget; how much of the target stays

Leave the second one out, and as much stays as the budget has room for; of the embedded model, which is small, all.
"""

from __future__ import annotations

import sys

from llmcad_mlx import LlmcadError, load

QUESTION = "Repeat: the quick brown fox jumps over the lazy dog, the quick brown fox jumps over the lazy dog."


def main() -> None:
    memory = sys.argv[1] if len(sys.argv) > 1 else "800MB"
    pinned = sys.argv[2] if len(sys.argv) > 2 else "auto" if len(sys.argv) > 1 else "30MB"
    with load(memory=memory, pinned=pinned) as engine:
        plan = engine.pair.plan
        assert plan is not None  # there is one whenever memory is given
        print(f"pinned: {plan.pinned_bytes / 1e6:.0f} MB, layers {list(plan.pinned_layers)}")
        print(f"streamed: {plan.streamed_bytes / 1e6:.0f} MB on every pass of the target")
        result = engine.generate([{"role": "user", "content": QUESTION}], max_tokens=48)
    stats = result.stats
    print(result.text)
    print(f"{stats.generated_tokens} tokens in {stats.target_passes} passes, {stats.tokens_per_s:.1f} tokens/s")
    print(f"read: {stats.streamed_bytes / 1e6:.0f} MB; waited: {stats.io_wait_s:.2f} of {stats.decode_s:.2f} s")


if __name__ == "__main__":
    try:
        main()
    except LlmcadError as error:  # a budget that cannot work names the smallest one that can
        sys.exit(str(error))
