"""How far a draft's trees reach in the real engine, on prompts that nothing was trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmcad_mlx.api import Engine
from llmcad_mlx.drafting.ngram import NgramDrafter
from llmcad_mlx.engine.round import Round
from llmcad_mlx.loader import LoadedPair, load_pair
from llmcad_mlx.measure.prompts import BenchPrompt
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.tree.token_tree import NGRAM

LOOKUP = "prompt lookup"


@dataclass(slots=True)
class Reach:
    """Counts of generations. `accepted`: tokens by who drafted them; `path_tested`: see `GenerationStats`."""

    tokens: int = 0
    passes: int = 0
    path_tested: int = 0
    accepted: Counter[str] = field(default_factory=Counter)

    def add(self, other: Reach) -> None:
        self.tokens += other.tokens
        self.passes += other.passes
        self.path_tested += other.path_tested
        self.accepted += other.accepted

    @property
    def tokens_per_pass(self) -> float:
        """Generated tokens / target passes, bonus tokens included."""
        return self.tokens / self.passes if self.passes else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / tested-path tokens."""
        return self.accepted.total() / self.path_tested if self.path_tested else 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One way of drafting with `nodes` nodes in every pass: what each prompt gave, in the prompts' order."""

    name: str
    nodes: int
    prompts: Sequence[BenchPrompt]
    reached: Sequence[Reach]

    def over(self, domain: str | None = None) -> Reach:
        """The sum over a domain, or over all."""
        total = Reach()
        for prompt, reach in zip(self.prompts, self.reached, strict=True):
            if domain in (None, prompt.domain):
                total.add(reach)
        return total


def measure(
    target: str,
    drafts: Sequence[str],
    prompts: Sequence[BenchPrompt],
    node_counts: Sequence[int],
    max_tokens: int,
    on_prompt: Callable[[str], None] = lambda what: None,
) -> Iterator[Measured]:
    """Prompt lookup alone, then each draft alone and beside it, at T = 0 in trees of so many nodes.

    on_prompt: told what is done before each generation. Raises the errors of `load`.
    """
    for number, draft in enumerate(drafts or ["ngram"]):
        pair = load_pair(target, draft, show_progress=False)
        try:
            for name, variant in _ways(pair, Path(draft).name, with_lookup=number == 0):
                for nodes in node_counts:
                    engine, reached = Engine(replace(variant, profile=PairProfile(None))), []
                    for prompt in prompts:
                        on_prompt(f"{name}, {nodes} nodes: {prompt.domain}/{prompt.name}")
                        reached.append(_generate(engine, prompt, nodes, max_tokens))
                    yield Measured(name, nodes, prompts, reached)
        finally:
            pair.release()


def _ways(pair: LoadedPair, draft: str, with_lookup: bool) -> Iterator[tuple[str, LoadedPair]]:
    """The same models with other drafters."""
    others = [drafter for drafter in pair.drafters if drafter.source != NGRAM]
    if with_lookup:
        yield LOOKUP, replace(pair, drafters=[NgramDrafter()])
    if others:
        yield draft, replace(pair, drafters=others)
        yield f"{draft} and {LOOKUP}", replace(pair, drafters=[NgramDrafter(), *others])


def _generate(engine: Engine, prompt: BenchPrompt, nodes: int, max_tokens: int) -> Reach:
    """From empty caches; what was learned about confidences is kept."""
    reach = Reach()

    def count(done: Round) -> None:
        reach.tokens += len(done.walk.tokens)
        reach.passes += 1
        reach.path_tested += done.walk.path_tested
        reach.accepted.update(done.selection.tree.sources[node] for node in done.walk.nodes)

    engine.pair.target.truncate(0)
    for drafter in engine.pair.drafters:
        drafter.truncate(0)
    messages = [{"role": "user", "content": prompt.text}]
    for _ in engine.stream_generate(messages, on_round=count, max_tokens=max_tokens, tree_nodes=nodes):
        pass
    return reach


def table_of(measured: Sequence[Measured]) -> str:
    """Markdown: tokens per pass by domain, over all with the lowest and highest prompt, and who drafted what was
    accepted, in tokens per pass."""
    domains = list(dict.fromkeys(prompt.domain for prompt in measured[0].prompts))
    head = ["draft", "nodes", *domains, "all", "lowest to highest", "accepted", "of it"]
    rows = [head, ["---"] * len(head)]
    for line in measured:
        total = line.over()
        each = [reach.tokens_per_pass for reach in line.reached]
        who = ", ".join(f"{source} {count / total.passes:.2f}" for source, count in total.accepted.most_common())
        rows.append(
            [
                line.name, str(line.nodes), *(f"{line.over(domain).tokens_per_pass:.2f}" for domain in domains),
                f"{total.tokens_per_pass:.2f}", f"{min(each):.2f} to {max(each):.2f}",
                f"{100 * total.acceptance_rate:.0f} %", who or "-",
            ]
        )  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
