"""The drafts that could serve a target: those named, or what is there for it, and their smaller copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.errors import LlmcadError, ModelError
from llmcad_mlx.models.draft_parts import vocabulary_size
from llmcad_mlx.models.loading import load_model_folder, read_config
from llmcad_mlx.models.trimmed_head import FILE as DRAFT_TOKENS
from llmcad_mlx.pair_names import AUTO_DRAFT, NGRAM_DRAFT, NO_DRAFT, PairNames, name_pair
from llmcad_mlx.sources.copy_names import CopyName
from llmcad_mlx.sources.quantised_copy import stored_bits
from llmcad_mlx.sources.resolve import preset_draft
from llmcad_mlx.sources.self_draft import BITS as SELF_BITS
from llmcad_mlx.sources.self_draft import PREFIX, self_draft_bits


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft that is there. `name`: as `--draft` takes it, wherever it is typed."""

    name: str
    names: PairNames

    @property
    def label(self) -> str:
        """Short, for people."""
        return short_name(self.name)


@dataclass(frozen=True, slots=True)
class Failure:
    """A draft that is no candidate, or has stopped being one, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Candidates:
    """All that were looked for; the last one found is "none", which the others are compared with."""

    found: tuple[Candidate, ...]
    failures: tuple[Failure, ...]


def find_candidates(
    target: str,
    target_path: Path,
    drafts: Sequence[str] | None,
    bits: Sequence[int],
    tokens: Sequence[int],
    incumbent: str | None,
    show_progress: bool,
) -> Candidates:
    """Fetch and make the candidates for the target named `target`, which lies in `target_path`.

    drafts: names as `--draft` takes them; None: the `incumbent`, what the target's preset names, prompt lookup,
    and the target itself in fewer bits. bits: a draft model with more bits is tried in so many, too. tokens: and
    all of them with an output vocabulary of so many tokens, where they have more than twice as many. A draft that
    cannot be had is among the failures.
    """
    found: dict[str, Candidate] = {}
    failures: dict[str, Failure] = {}
    given = _default(target, target_path, incumbent) if drafts is None else drafts
    waiting = [_lasting(preset_draft(target) if name == AUTO_DRAFT else name) for name in given]
    for name in waiting:
        _find(name, target_path, show_progress, found, failures)
    whole = [found[name] for name in waiting if name in found]
    for candidate in whole:
        for name in _smaller(candidate, bits):
            _find(name, target_path, show_progress, found, failures)
    for candidate in list(found.values()):
        for name in _trimmed(candidate, tokens):
            _find(name, target_path, show_progress, found, failures)
    found.pop(NO_DRAFT, None)
    found[NO_DRAFT] = Candidate(NO_DRAFT, name_pair(target_path, NO_DRAFT, show_progress))
    return Candidates(tuple(found.values()), tuple(failures.values()))


def short_name(name: str) -> str:
    """A candidate's name without the folders that lead to it."""
    copy = CopyName.of(name)
    if copy is not None:
        return f"{copy.prefix}{short_name(copy.draft)}"
    return Path(name).name if Path(name).is_absolute() else name


def _find(
    name: str,
    target_path: Path,
    show_progress: bool,
    found: dict[str, Candidate],
    failures: dict[str, Failure],
) -> None:
    if name in found or name in failures:
        return
    try:
        found[name] = Candidate(name, name_pair(target_path, name, show_progress))
    except LlmcadError as error:
        failures[name] = Failure(name, str(error))


def _default(target: str, target_path: Path, incumbent: str | None) -> Iterator[str]:
    if incumbent is not None:
        yield incumbent
    yield preset_draft(target)
    yield NGRAM_DRAFT
    present = _bits_of(target_path)
    yield from (f"{PREFIX}{bits}" for bits in sorted(SELF_BITS, reverse=True) if bits < present)


def _smaller(candidate: Candidate, bits: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that have fewer bits."""
    path, name = candidate.names.draft_path, candidate.name
    if path is None or not path.is_dir() or CopyName.of(name) is not None or self_draft_bits(name) is not None:
        return
    present = _bits_of(path)
    yield from (str(CopyName(name, bits=number)) for number in sorted(bits, reverse=True) if number < present)


def _trimmed(candidate: Candidate, tokens: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that propose fewer tokens."""
    path, copy = candidate.names.draft_path, CopyName.of(candidate.name)
    if path is None or not path.is_dir() or (copy is not None and copy.tokens is not None):
        return
    if (path / DRAFT_TOKENS).exists():
        return
    present = vocabulary_size(read_config(path)) or 0
    yield from (str(CopyName(candidate.name, tokens=number)) for number in tokens if 2 * number < present)


def _bits_of(folder: Path) -> int:
    """0 for a model that cannot be quantised."""
    try:
        return stored_bits(load_model_folder(folder, lazy=True, alone=True))
    except ModelError:
        return 0


def _lasting(name: str) -> str:
    """The same draft, wherever the program is started."""
    copy = CopyName.of(name)
    if copy is not None:
        return f"{copy.prefix}{_lasting(copy.draft)}"
    if name in (NGRAM_DRAFT, NO_DRAFT):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
