"""Your own drafter: a function that guesses the next token. This one knows phrases that answers often hold.

python examples/your_own_drafter.py "What is the capital of Italy?"

A wrong guess costs a little time and never a wrong token: the target verifies all of them.
"""

from __future__ import annotations

import sys

from llmcad_mlx import load

PHRASES = [f"The capital of {land} is {city}." for land, city in [("France", "Paris"), ("Italy", "Rome")]]


class PhraseList:
    """After two tokens that stand in a phrase it proposes the one that follows there."""

    def __init__(self, phrases: list[list[int]]) -> None:
        self.following: dict[tuple[int, int], dict[int, float]] = {}
        for tokens in phrases:
            for first, second, third in zip(tokens, tokens[1:], tokens[2:], strict=False):
                self.following.setdefault((first, second), {})[third] = 0.6  # how sure; the engine learns better

    def propose(self, tokens: list[int]) -> list[tuple[int, float]]:
        """Pairs of next token and confidence, for a text that ends with `tokens`."""
        return list(self.following.get(tuple(tokens[-2:]), {}).items())


def main() -> None:
    question = sys.argv[1] if len(sys.argv) > 1 else "What is the capital of France?"
    messages = [{"role": "user", "content": question}]
    with load(draft="ngram") as engine:
        plain = engine.generate(messages, max_tokens=40, policy="plain")
        phrases = PhraseList([engine.tokenizer.encode(phrase, add_special_tokens=False) for phrase in PHRASES])
        engine.add_drafter("phrases", phrases.propose)
        result = engine.generate(messages, max_tokens=40, tree_nodes=8)  # always 8 nodes, to see what it is worth
    print(result.text)
    print(f"without a draft: {plain.stats.target_passes} passes of the target")
    print(f"with the phrases: {result.stats.target_passes}, the same tokens: {result.tokens == plain.tokens}")


if __name__ == "__main__":
    main()
