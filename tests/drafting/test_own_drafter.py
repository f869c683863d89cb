"""`Engine.add_drafter`: a function of the user's drafts, changes no text, and is refused when it is wrong."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import Engine, UsageError
from llmcad_mlx.api import load
from llmcad_mlx.engine.round import Round
from tests.support.architecture_configs import build, config_of
from tests.support.tiny_folder import write_folder

PROMPT = "then the other one ran in"
LENGTH = 24

pytestmark = pytest.mark.usefixtures("tiny_home")


class Clairvoyant:
    """Knows what the target is going to say."""

    def __init__(self, prompt: list[int], said: list[int]) -> None:
        self.start, self.said = len(prompt), said

    def __call__(self, tokens: list[int]) -> Iterable[tuple[int, float]]:
        at = len(tokens) - self.start
        return [(7, 0.1), (self.said[at], 0.9)] if at < len(self.said) else []


def plain_tokens(engine: Engine, **options: Any) -> list[int]:
    return engine.generate(PROMPT, max_tokens=LENGTH, policy="plain", **options).tokens


@pytest.mark.parametrize("draft", [None, "ngram"])
@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"tree_nodes": 8}, 4),
        ({"tree_nodes": 8, "temperature": 0.9, "seed": 5}, 4),
        ({"policy": "chain"}, 6),  # four tokens and the target's own with each pass
        ({"policy": "paper"}, 12),
    ],
)
def test_a_drafter_that_knows_saves_passes(
    folder: Path, draft: str | None, options: dict[str, Any], passes: int
) -> None:
    sampling = {name: value for name, value in options.items() if name in ("temperature", "seed")}
    with load(folder, draft) as engine:
        said = plain_tokens(engine, **sampling)
        engine.add_drafter("oracle", Clairvoyant(engine.encode(PROMPT), said))
        rounds: list[Round] = []
        for response in engine.stream_generate(PROMPT, on_round=rounds.append, max_tokens=LENGTH, **options):
            stats = response.stats
        assert stats is not None
        assert stats.target_passes <= passes
        assert [token for done in rounds for token in done.walk.tokens] == said
        assert any("oracle" in done.drafted.sources for done in rounds)


def test_it_gets_the_whole_text_is_asked_before_the_draft_model_and_changes_nothing(
    folder: Path, draft: Path
) -> None:
    """Always wrong, and certain of it."""
    seen: list[list[int]] = []
    with load(folder, draft) as engine:
        said, prompt = plain_tokens(engine), engine.encode(PROMPT)

        def wrong(tokens: list[int]) -> Iterable[tuple[int, float]]:
            seen.append(list(tokens))
            at = len(tokens) - len(prompt)
            tokens.clear()  # it is the function's own list
            return [(((said[at] if at < len(said) else 0) + 1) % engine.pair.vocab_size, 1.0)]

        engine.add_drafter("wrong", wrong)
        assert [drafter.source for drafter in engine.pair.drafters] == ["ngram", "wrong", "model"]
        result = engine.generate(PROMPT, max_tokens=LENGTH, tree_nodes=4)
        assert result.tokens == said
        assert result.stats.tested > 0
    assert seen[0] == prompt
    assert all(tokens[: len(prompt)] == prompt for tokens in seen)
    assert any(tokens[len(prompt) :] for tokens in seen)


def test_what_it_is_worth_is_learned_under_its_name(folder: Path) -> None:
    for expected in (0.5, 0.9):  # the second load starts with what the first has learned
        with load(folder, "ngram") as engine:
            calibration = engine.pair.profile.calibration
            assert expected - 0.01 <= calibration.probabilities([0.5], "learner")[0] <= 1.0
            knows = Clairvoyant(engine.encode(PROMPT), plain_tokens(engine))
            engine.add_drafter(
                "learner",
                lambda tokens, knows=knows: [(token, 0.5) for token, sure in knows(tokens) if sure > 0.5],
            )
            for _ in range(3):
                engine.generate(PROMPT, max_tokens=LENGTH, tree_nodes=8)


@pytest.mark.parametrize(
    ("proposal", "complaint"),
    [
        ((3, 1.5), "drafter bad: confidence 1.5 is not from 0 to 1"),
        ((3, float("nan")), "drafter bad: confidence nan is not from 0 to 1"),
        ((10**6, 0.5), "drafter bad: token 1000000 is not in the vocabulary"),
        ((-1, 0.5), "drafter bad: token -1 is not in the vocabulary"),
        ((2.5, 0.5), r"drafter bad: \(2.5, 0.5\) is no pair of token id and confidence"),
        (3, "drafter bad: 3 is no pair"),
        ((3, 0.5, 1), "drafter bad: .* is no pair"),
        ((3, "sure"), "drafter bad: .* is no pair"),
    ],
)
def test_a_proposal_that_is_none_is_refused_and_the_engine_lives(
    folder: Path, proposal: Any, complaint: str
) -> None:
    with load(folder, "ngram") as engine:
        engine.add_drafter("bad", lambda tokens: [proposal])
        with pytest.raises(UsageError, match=complaint):
            engine.generate(PROMPT, max_tokens=LENGTH, tree_nodes=4)
        assert len(plain_tokens(engine)) == LENGTH


def test_names_are_told_apart_and_functions_are_wanted(folder: Path) -> None:
    with load(folder, "ngram") as engine:
        for name in ("ngram", "model", "committed"):
            with pytest.raises(UsageError, match=f"name: '{name}' is taken"):
                engine.add_drafter(name, lambda tokens: ())
        with pytest.raises(UsageError, match="name: '' is no name"):
            engine.add_drafter("", lambda tokens: ())
        with pytest.raises(UsageError, match="propose: 3 cannot be called"):
            engine.add_drafter("three", 3)  # type: ignore[arg-type]
        assert [drafter.source for drafter in engine.pair.drafters] == ["ngram"]
    with pytest.raises(UsageError, match="this engine is closed"):
        engine.add_drafter("late", lambda tokens: ())


def test_a_target_that_verifies_no_drafts_takes_no_drafter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "mamba", build("mamba"), config_of("mamba"))
    with load(folder) as engine, pytest.raises(UsageError, match="this target verifies no drafts"):
        engine.add_drafter("phrases", lambda tokens: ())
