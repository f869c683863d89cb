"""The drafts that could serve a target: those named, or what is there for it, and their smaller copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmcad_mlx.errors import LlmcadError, ModelError, UsageError
from llmcad_mlx.files import user_path
from llmcad_mlx.measure.workload import listed
from llmcad_mlx.models.folder import DRAFT_TOKENS, load_model_folder, read_config, vocabulary_size
from llmcad_mlx.store.copies import BITS, SELF_BITS, DerivedDraft, stored_bits
from llmcad_mlx.store.names import AUTO_DRAFT, NO_DRAFT, PairPaths, pair_with_draft, preset_draft
from llmcad_mlx.store.presets import NGRAM

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
        names = None if drafts is None else tuple(dict.fromkeys(listed(drafts)))
        if names == ():
            raise UsageError("drafts: none given; name some, separated by commas, or leave the option out")
        for name in names or ():
            DerivedDraft.parse(name)
        known = [str(number) for number in BITS]
        widths, sizes = ([] if text == NONE else [*map(str.strip, text.split(","))] for text in (bits, trim))
        for name in widths:
            if name not in known:
                raise UsageError(f"bits: {name!r} is not one of {', '.join(known)}, or {NONE}")
        if not all(name.isascii() and name.isdigit() and int(name) for name in sizes):
            raise UsageError(f"trim: {trim!r} is not a list of numbers of tokens like 4096,8192, or {NONE}")
        return cls(names, tuple(dict.fromkeys(map(int, widths))), tuple(dict.fromkeys(map(int, sizes))))


@dataclass(frozen=True, slots=True)
class Lineup:
    """A target and the drafts that were looked for: the candidates are found, not loaded, by names that `--draft`
    takes wherever it is typed; the last one is "none", which the others are compared with. `failures`: why a draft
    is no candidate. `incumbent`: the draft chosen before, if one was."""

    target: str
    target_path: Path
    candidates: tuple[PairPaths, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
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
    """Fetch and make the candidates for the target named `target`, which lies in `target_path`."""
    found: dict[str, PairPaths] = {}
    failures: dict[str, str] = {}

    def add(names: Iterable[str]) -> None:
        for name in names:
            if name in found or name in failures:
                continue
            try:
                found[name] = pair_with_draft(target_path, name, show_progress)
            except LlmcadError as error:
                failures[name] = str(error)

    given = options.names
    if given is None:
        copies = (str(DerivedDraft(None, bits)) for bits in _fewer(SELF_BITS, target_path))
        given = (*filter(None, [incumbent]), preset_draft(target), NGRAM, *copies)
    add(_lasting(preset_draft(target) if name == AUTO_DRAFT else name) for name in given)
    for candidate in list(found.values()):
        add(_smaller(candidate, options.bits))
    for candidate in list(found.values()):
        add(_trimmed(candidate, options.tokens))
    found.pop(NO_DRAFT, None)
    plain = pair_with_draft(target_path, NO_DRAFT, show_progress)
    return Lineup(target, target_path, (*found.values(), plain), failures, incumbent)


def _smaller(candidate: PairPaths, bits: Sequence[int]) -> list[str]:
    path, name = candidate.draft_path, candidate.draft_name
    if path is None or not path.is_dir() or DerivedDraft.parse(name) is not None:
        return []
    return [str(DerivedDraft(name, bits=number)) for number in _fewer(bits, path)]


def _trimmed(candidate: PairPaths, tokens: Sequence[int]) -> list[str]:
    path, derived = candidate.draft_path, DerivedDraft.parse(candidate.draft_name)
    trimmed = derived is not None and derived.tokens is not None
    if trimmed or path is None or not path.is_dir() or (path / DRAFT_TOKENS).exists():
        return []
    present = vocabulary_size(read_config(path)) or 0
    return [str(DerivedDraft(candidate.draft_name, tokens=number)) for number in tokens if 2 * number < present]


def _fewer(bits: Sequence[int], folder: Path) -> list[int]:
    """Those of `bits` that the model in `folder` has more than, most first; none if it cannot be quantised."""
    try:
        present = stored_bits(load_model_folder(folder, lazy=True, alone=True))
    except ModelError:
        return []
    return [number for number in sorted(bits, reverse=True) if number < present]


def _lasting(name: str) -> str:
    """The same draft, wherever the program is started."""
    derived = DerivedDraft.parse(name)
    if derived is not None:
        return derived.renamed(_lasting)
    if name in (NGRAM, NO_DRAFT):
        return name
    path = user_path(name)
    return str(path.resolve()) if path.exists() else name
