"""The round: what is counted, what an interruption leaves behind, and what models without trees are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.drafting.lookup import NgramDrafter
from llmcad_mlx.drafting.model import ModelDrafter
from llmcad_mlx.models.probe import probe
from llmcad_mlx.models.tree_model import TreeModel
from llmcad_mlx.policy import ChainPolicy, GrowthPolicy
from llmcad_mlx.policy.best_first import ThroughputPolicy
from llmcad_mlx.policy.calibration import Calibration
from llmcad_mlx.policy.costs import CostModel
from llmcad_mlx.policy.paper import PaperPolicy
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.tree.token_tree import TokenTree
from llmcad_mlx.verifying import Target, Verification
from tests.support.architecture_configs import VOCAB as FAMILY_VOCAB
from tests.support.architecture_configs import build, config_of
from tests.support.faults import Interrupting
from tests.support.rounds import PROMPT, Charged, Rounds, forced, model, plain_text, sampler_of
from tests.support.simulated_stream import SimulatedClock, WaitingTarget
from tests.support.tiny import VOCAB

Background = Callable[[float], bool] | None


@functools.cache
def family(name: str) -> TreeModel:
    """A tiny model of one of mlx-lm's families."""
    built = build(name)
    prepare_for_device(built)
    return TreeModel(built, config_of(name), probe(built))


GREEDY = sampler_of(vocab_size=FAMILY_VOCAB)


# -- interruptions -----------------------------------------------------------------------------------------


PLACES = ["verify", "expand", "model expand", "target commit", "drafter commit", "policy", "stop"]
TARGETS: dict[str, Callable[[], Target]] = {
    "resident": lambda: Target(model(), VOCAB),
    "waiting": lambda: WaitingTarget(model(), VOCAB, most=4),  # most expansions happen inside of verify
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("call", "goes_on"), [(1, False), (3, False), (4, True)])
def test_an_interrupted_round_leaves_a_state_to_start_from(
    place: str, call: int, goes_on: bool, after: bool, target: str
) -> None:
    """Its text can go on, or a prompt begin: the same again, the conversation, or another with this beginning."""
    engine = Rounds(TARGETS[target](), [NgramDrafter(), ModelDrafter(model(noise=0.2))], forced(8))
    engine.begin(PROMPT)
    if goes_on:
        engine.decode(5)
    caller = SimpleNamespace(stop=lambda token: False)
    owner, name = {
        "verify": (engine.target, "verify"),
        "expand": (engine.drafters[0], "expand"),
        "model expand": (engine.drafters[-1], "expand"),
        "target commit": (engine.target, "commit"),
        "drafter commit": (engine.drafters[-1], "commit"),
        "policy": (engine.policy, "verified"),
        "stop": (caller, "stop"),
    }[place]
    Interrupting(call, after).around(owner, name)
    with pytest.raises(KeyboardInterrupt):
        engine.decode(200, stop=caller.stop)
    if goes_on:
        engine.decode(30)
    kept = list(engine.tokens)
    assert kept == [*PROMPT, *plain_text(PROMPT, 200)][: len(kept)]
    for prompt in () if goes_on else (PROMPT, [*kept, 7, 8], [*PROMPT[:4], 9, 9]):
        engine.begin(prompt)
        assert engine.decode(10)[:10] == plain_text(prompt, 10)


def test_a_round_is_read_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of a pass are evaluated together; the walk looks at views of them and computes nothing."""
    engine = Rounds(None, [ModelDrafter(model(noise=0.05))], forced(8))
    engine.begin(PROMPT)
    verify, evaluate, calls = engine.target.verify, mx.eval, list[str]()

    def verified(*args: Any) -> Verification:
        done = verify(*args)
        assert all(np.shares_memory(done.row(0).base, done.row(node)) for node in range(len(args[0])))
        calls.append("walk")
        return done

    monkeypatch.setattr(engine.target, "verify", verified)
    monkeypatch.setattr(engine.policy, "verified", lambda *_: calls.append("end"))
    monkeypatch.setattr(mx, "eval", lambda *arrays: (calls.append("eval"), evaluate(*arrays)))
    engine.decode(40)
    walks = [calls[place : place + 2] for place, call in enumerate(calls) if call == "walk"]
    assert len(walks) > 5
    assert all(walk == ["walk", "end"] for walk in walks)


@pytest.mark.parametrize("place", ["prefill", "verify"])
def test_a_read_error_of_the_target_leaves_a_state_to_go_on_from(place: str) -> None:
    """What a streamed target raises when a file is gone, in the prompt or in the middle of a pass."""

    def fail(*args: object) -> bool:
        raise OSError("the file is gone")

    target = WaitingTarget(model(), VOCAB)
    engine = Rounds(target, [ModelDrafter(model(noise=0.2))], forced(8))
    engine.begin(PROMPT[:3])
    engine.decode(3)
    sound, target._wait = target._wait, fail  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="gone"):
        engine.begin(PROMPT) if place == "prefill" else engine.round()
    target._wait = sound  # type: ignore[method-assign]
    said = list(engine.tokens)
    assert engine.decode(20)[:20] == plain_text(said, 20)[:20]


def test_an_interrupted_prefill_is_taken_up_again() -> None:
    engine = Rounds(None, [ModelDrafter(model())], forced(8))
    prompt = [(7 * i) % VOCAB for i in range(1400)]

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.begin(prompt, on_progress=stop)
    assert 0 < engine.target.cache.length < len(prompt) - 1
    stats = GenerationStats()
    engine.begin(prompt, stats)
    assert stats.reused_tokens == 512
    assert engine.decode(20)[:20] == plain_text(prompt, 20)[:20]


# -- accounting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [forced(6), PaperPolicy(12), ChainPolicy(3)], ids=["forced", "paper", "chain"])
def test_counts_and_seconds_add_up(policy: GrowthPolicy) -> None:
    clock, drafter = SimulatedClock(), ModelDrafter(model(noise=0.2))
    engine = Rounds(None, [drafter], policy, clock=clock)
    verify = Charged(engine.target, "verify", clock, 4.0)
    expand = Charged(drafter, "expand", clock, 1.0)
    prefill = Charged(engine.target, "prefill", clock, 64.0)
    commit = Charged(engine.target, "commit", clock, 0.25)
    stats, seen = GenerationStats(), GenerationStats()
    engine.begin(PROMPT, stats)
    assert (stats.prompt_s, stats.prompt_tokens, stats.reused_tokens) == (64.0, len(PROMPT), 0)
    fed, carried = 0, 0
    for _ in range(12):
        before = expand.calls
        done = engine.round(stats=stats)
        fed += expand.calls - before
        submitted = done.selection.tree
        seen.drafted += len(done.drafted) - 1 - carried
        carried = len(done.survivors.tree) - 1 if done.survivors is not None else 0
        seen.survived += carried > 0
        seen.tested += len(submitted) - 1
        seen.accepted += done.walk.num_accepted
        seen.path_tested += done.walk.path_tested
        seen.generated_tokens += len(done.walk.tokens)
        assert len(done.walk.tokens) == done.walk.num_accepted + 1
        assert done.walk.num_accepted <= done.walk.path_tested <= done.walk.num_accepted + 1
        assert len(submitted) <= len(done.drafted)
    assert (stats.drafted, stats.tested, stats.accepted) == (seen.drafted, seen.tested, seen.accepted)
    assert (stats.path_tested, stats.generated_tokens) == (seen.path_tested, seen.generated_tokens)
    assert stats.generated_tokens == len(engine.tokens) - len(PROMPT)
    assert (stats.survived, stats.provisional, stats.provisional_passes) == (seen.survived, 0, 0)
    if isinstance(policy, ThroughputPolicy):  # nodes that it left out were the target's choice at times
        assert seen.survived > 0
    assert stats.target_passes == verify.calls == 12
    assert stats.tokens_per_pass == stats.generated_tokens / 12
    assert stats.acceptance_rate == stats.accepted / stats.path_tested
    assert (stats.verify_s, stats.draft_s) == (48.0, fed)
    assert prefill.calls == 1
    assert commit.calls == 12
    assert stats.other_s == 3.0
    assert stats.decode_s == stats.draft_s + stats.verify_s + stats.other_s
    assert stats.tokens_per_s == stats.generated_tokens / stats.decode_s
    # What the policy prices with is what the clock said.
    assert engine.costs.verify.predict(len(submitted)) == 4.0
    assert engine.costs.draft.predict(1) == 1.0


# -- models that take no trees -----------------------------------------------------------------------------


class Watching(Target):
    """Keeps what it was given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[list[int]] = []

    def verify(self, tree: TokenTree, background: Background = None) -> Verification:
        self.seen.append(list(tree.parents))
        return super().verify(tree)


def bushy() -> GrowthPolicy:
    """To the default policy, rows and draft steps are cheap: it wants branches."""
    costs = CostModel()
    for rows in (1, 2, 4, 8, 16, 32, 64):
        costs.draft.observe(rows, 0.01)
        costs.verify.observe(rows, 1.0)
    return ThroughputPolicy(costs, Calibration())


@pytest.mark.parametrize(
    ("target", "draft", "make"),
    [
        ("gpt2", "llama", bushy),
        ("gpt2", "llama", lambda: forced(16)),
        ("gpt2", "llama", lambda: PaperPolicy(16)),
        ("gpt2", "gpt2", lambda: ChainPolicy(4)),
        ("llama", "gpt2", lambda: forced(12)),  # such a draft proposes below its own line only
    ],
)
def test_a_model_that_takes_chains_only_ever_gets_chains(
    target: str, draft: str, make: Callable[[], GrowthPolicy]
) -> None:
    watched, stats = Watching(family(target), FAMILY_VOCAB), GenerationStats()
    engine = Rounds(watched, [NgramDrafter(), ModelDrafter(family(draft))], make())
    engine.begin(PROMPT)
    while stats.generated_tokens < 40:
        engine.round(GREEDY, stats)
    assert engine.tokens == [*PROMPT, *mlx_lm_text(target, PROMPT, stats.generated_tokens)]
    assert max(map(len, watched.seen)) > 1
    if watched.cache.capability == "chain":
        assert all(parents == list(range(-1, len(parents) - 1)) for parents in watched.seen)
    if target == draft:
        assert (stats.acceptance_rate, stats.tokens_per_pass) == (1.0, 5.0)


def mlx_lm_text(name: str, prompt: Sequence[int], count: int) -> list[int]:
    """What mlx-lm itself generates, greedily."""
    steps = generate_step(mx.array(prompt), family(name).model, max_tokens=count)
    return [int(token) for token, _ in steps]


def test_a_model_that_cannot_take_tokens_back_runs_plainly_and_equals_mlx_lm() -> None:
    """Drafters or not, it is given one token at a time, never a tree."""
    target = Watching(family("mamba"), FAMILY_VOCAB)
    assert target.cache.capability == "plain"
    engine = Rounds(target, [NgramDrafter()], forced(8))
    engine.begin(PROMPT)
    text = engine.decode(24, GREEDY)
    assert text == mlx_lm_text("mamba", PROMPT, 24)
    assert target.seen == [[-1]] * 24
    # Going on keeps the state; an edit starts again.
    stats = GenerationStats()
    longer = [*PROMPT, *text, 3, 4]
    engine.begin(longer, stats)
    assert stats.reused_tokens == len(PROMPT) + 23
    assert engine.decode(8, GREEDY) == mlx_lm_text("mamba", longer, 8)
    edited = [*PROMPT[:5], 8, 9]
    engine.begin(edited, stats)
    assert stats.reused_tokens == 0
    assert engine.decode(8, GREEDY) == mlx_lm_text("mamba", edited, 8)
