"""The drafts that could serve a target: those named, or what is there for it, and their smaller copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.models.folder import DRAFT_TOKENS, load_model_folder, read_config, vocabulary_size
from llmcad_mlx.store.copies import BITS, SELF_BITS, DerivedDraft, stored_bits
from llmcad_mlx.store.names import AUTO_DRAFT, NGRAM_DRAFT, NO_DRAFT, PairPaths, pair_with_draft
from llmcad_mlx.store.pull import preset_draft

NONE = "none"


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """What to look for. `names`: as `--draft` takes them; None: the draft chosen before, what the target's preset
    names, prompt lookup, and the target itself in fewer bits. `bits`: a draft model with more bits is tried in so
    many, too. `tokens`: and all of them with an output vocabulary of so many tokens, where they have more than
    twice as many."""

    names: tuple[str, ...] | None = None
    bits: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, drafts: str | None, bits: str, trim: str) -> DraftOptions:
        """Check what the command line was given. Raises UsageError naming the option."""
        return cls(None if drafts is None else _names(drafts), _bits(bits), _tokens(trim))


def _names(text: str) -> tuple[str, ...]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("drafts: none given; name some, separated by commas, or leave the option out")
    for name in names:
        DerivedDraft.parse(name)
    return tuple(names)


def _bits(text: str) -> tuple[int, ...]:
    known = {str(bits): bits for bits in BITS}
    names = [] if text == NONE else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"bits: {name!r} is not one of {', '.join(known)}, or {NONE}")
    return tuple(dict.fromkeys(known[name] for name in names))


def _tokens(text: str) -> tuple[int, ...]:
    names = [] if text == NONE else [name.strip() for name in text.split(",")]
    if not all(name.isascii() and name.isdigit() and int(name) for name in names):
        raise UsageError(f"trim: {text!r} is not a list of numbers of tokens like 4096,8192, or {NONE}")
    return tuple(dict.fromkeys(int(name) for name in names))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft that is there. `name`: as `--draft` takes it, wherever it is typed."""

    name: str
    names: PairPaths

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
class Lineup:
    """A target and the drafts that were looked for: the candidates are found, not loaded; the last one is "none",
    which the others are compared with. `incumbent`: the draft chosen before, if one was."""

    target: str
    target_path: Path
    candidates: tuple[Candidate, ...]
    failures: tuple[Failure, ...] = ()
    incumbent: str | None = None


def short_name(name: str) -> str:
    """A candidate's name without the folders that lead to it."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(short_name)
    return Path(name).name if Path(name).is_absolute() else name


def find_candidates(
    target: str, target_path: Path, options: DraftOptions, incumbent: str | None, show_progress: bool
) -> Lineup:
    """Fetch and make the candidates for the target named `target`, which lies in `target_path`.

    A draft that cannot be had is among the failures.
    """
    search = _Search(target_path, show_progress)
    given = _default(target, target_path, incumbent) if options.names is None else options.names
    for name in [_lasting(preset_draft(target) if name == AUTO_DRAFT else name) for name in given]:
        search.add(name)
    for candidate in list(search.found.values()):
        for name in _smaller(candidate, options.bits):
            search.add(name)
    for candidate in list(search.found.values()):
        for name in _trimmed(candidate, options.tokens):
            search.add(name)
    search.found.pop(NO_DRAFT, None)
    plain = Candidate(NO_DRAFT, pair_with_draft(target_path, NO_DRAFT, show_progress))
    return Lineup(target, target_path, (*search.found.values(), plain), tuple(search.failures), incumbent)


class _Search:
    """Candidates by name, and what could not be had."""

    def __init__(self, target_path: Path, show_progress: bool) -> None:
        self._target_path = target_path
        self._show_progress = show_progress
        self.found: dict[str, Candidate] = {}
        self.failures: list[Failure] = []

    def add(self, name: str) -> None:
        """Find the draft, once."""
        if name in self.found or name in {failure.name for failure in self.failures}:
            return
        try:
            self.found[name] = Candidate(name, pair_with_draft(self._target_path, name, self._show_progress))
        except LlmcadError as error:
            self.failures.append(Failure(name, str(error)))


def _default(target: str, target_path: Path, incumbent: str | None) -> Iterator[str]:
    if incumbent is not None:
        yield incumbent
    yield preset_draft(target)
    yield NGRAM_DRAFT
    present = _bits_of(target_path)
    yield from (str(DerivedDraft(None, bits)) for bits in sorted(SELF_BITS, reverse=True) if bits < present)


def _smaller(candidate: Candidate, bits: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that have fewer bits."""
    path, name = candidate.names.draft_path, candidate.name
    if path is None or not path.is_dir() or DerivedDraft.parse(name) is not None:
        return
    present = _bits_of(path)
    yield from (str(DerivedDraft(name, bits=number)) for number in sorted(bits, reverse=True) if number < present)


def _trimmed(candidate: Candidate, tokens: Sequence[int]) -> Iterator[str]:
    """Names of the copies of a draft model that propose fewer tokens."""
    path, derived = candidate.names.draft_path, DerivedDraft.parse(candidate.name)
    if path is None or not path.is_dir() or (derived is not None and derived.tokens is not None):
        return
    if (path / DRAFT_TOKENS).exists():
        return
    present = vocabulary_size(read_config(path)) or 0
    yield from (str(DerivedDraft(candidate.name, tokens=number)) for number in tokens if 2 * number < present)


def _bits_of(folder: Path) -> int:
    """0 for a model that cannot be quantised."""
    try:
        return stored_bits(load_model_folder(folder, lazy=True, alone=True))
    except ModelError:
        return 0


def _lasting(name: str) -> str:
    """The same draft, wherever the program is started."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(_lasting)
    if name in (NGRAM_DRAFT, NO_DRAFT):
        return name
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name
