"""What a training run leaves in its folder, and how it goes on from there.

    checkpoint.safetensors   weights, optimizer, the head's tokens; as metadata settings, step, place in the corpus
    log.jsonl                a line of figures for each step, and one for each examination

A checkpoint is written under another name first, so there is always a whole one. Lines that came after it are
dropped when a run goes on: those steps are done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from distill.corpus import Ids
from distill.student import Student
from llmcad_mlx.errors import UsageError
from llmcad_mlx.files import new_file, write_text

_CHECKPOINT, _LOG = "checkpoint.safetensors", "log.jsonl"


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """All that the loss curve depends on, but for the corpus and the target.

    depth: the target's first layers that are kept. sources: its layers that the trained ones start from.
    head_tokens: V'. batch_tokens: of a step, padding included. The learning rate rises over `warmup` steps, then
    falls as a cosine to a tenth at `steps`. hard_share: see `loss`. train_head: the head's rows are trained, too.
    prompts: what the target would say inside the prompts is learned, too; labels there are the prompts' tokens.
    check_every: steps between two checkpoints, each with an examination on `check_tokens` tokens of texts that
    are never trained on.

    Raises UsageError naming the option.
    """

    depth: int
    sources: tuple[int, ...]
    head_tokens: int = 8192
    steps: int = 1000
    batch_tokens: int = 4096
    learning_rate: float = 1e-3
    warmup: int = 50
    hard_share: float = 0.0
    train_head: bool = False
    prompts: bool = True
    check_every: int = 100
    check_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"depth": 0, "warmup": 1, "seed": 0, "head_tokens": 4}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < least.get(field.name, 1):
                raise UsageError(f"{_option(field.name)}: {value} is less than {least.get(field.name, 1)}")
        if not self.sources:
            raise UsageError("--layers: at least one layer is trained")
        if not 0.0 < self.learning_rate < 1.0:
            raise UsageError(f"--learning-rate: {self.learning_rate} is not between 0 and 1")
        if not 0.0 <= self.hard_share <= 1.0:
            raise UsageError(f"--hard-share: {self.hard_share} is not between 0 and 1")
        if self.warmup >= self.steps:
            raise UsageError(f"--warmup: {self.warmup} steps leave none of {self.steps} to learn in")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run is: `step` steps are done; the next is batch `position` of the `shard`th shard since the start.
    The run uses the corpus's first `num_shards` shards to its end, also when others are written meanwhile."""

    num_shards: int
    step: int = 0
    shard: int = 0
    position: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A run's last state, as it was saved. `target`: digest of the model it is a student of."""

    path: Path
    settings: TrainingSettings
    target: str
    place: Place
    arrays: Mapping[str, mx.array]

    @classmethod
    def find(cls, folder: Path) -> Checkpoint | None:
        """The checkpoint in `folder`, or None. Raises UsageError for a file that is not one."""
        path = folder / _CHECKPOINT
        if not path.exists():
            return None
        try:
            loaded: Any = mx.load(str(path), return_metadata=True)
            arrays, metadata = loaded
            state = json.loads(metadata["state"])
            settings = TrainingSettings(**state["settings"] | {"sources": tuple(state["settings"]["sources"])})
            return cls(path, settings, state["target"], Place(**state["place"]), arrays)
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path}: not a checkpoint of this program ({reason}); name another run") from None

    @property
    def tokens(self) -> Ids:
        """(V',) ascending ids of the head's rows."""
        return np.asarray(self.arrays["tokens"])

    def check(self, settings: TrainingSettings, target: str) -> None:
        """Raise UsageError unless it is of this target and these settings."""
        if target != self.target:
            raise UsageError(f"{self.path}: is of another target; name another run")
        before, now = asdict(self.settings), asdict(settings)
        for name, value in before.items():
            if value != now[name]:
                raise UsageError(
                    f"{self.path}: was made with {_option(name)} {value}, not {now[name]}; "
                    "give the same settings to go on, or name another run"
                )

    def student(self, model: Any) -> Student:
        """The student of the target `model`, as it was saved."""
        student = Student(model, self.settings.sources, self.tokens, self.settings.train_head)
        student.load_weights(self._below("student."), strict=False)
        mx.eval(student.parameters())
        return student

    def restore(self, optimizer: Optimizer) -> None:
        """Put the saved state into the student's optimizer."""
        optimizer.state = tree_unflatten(self._below("optimizer."))
        mx.eval(optimizer.state)

    def _below(self, prefix: str) -> list[tuple[str, mx.array]]:
        return [(name.removeprefix(prefix), a) for name, a in self.arrays.items() if name.startswith(prefix)]


def save_checkpoint(
    folder: Path,
    settings: TrainingSettings,
    target: str,
    place: Place,
    tokens: Ids,
    student: Student,
    optimizer: Optimizer,
) -> None:
    """Replace the checkpoint in `folder`. Raises OSError."""
    saved = {"student": student.trainable_parameters(), "optimizer": optimizer.state, "tokens": mx.array(tokens)}
    arrays: Any = tree_flatten(saved, destination={})
    state = {"settings": asdict(settings), "target": target, "place": asdict(place)}
    with new_file(folder / _CHECKPOINT) as file:
        mx.save_safetensors(str(file), arrays, {"state": json.dumps(state)})


class TrainingLog:
    """Lines of figures, one JSON object each with its `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open the log of a run that goes on after `step`."""
        self._path = folder / _LOG
        kept = [line for line in read_log(folder) if line["step"] <= step] if step else []
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, **figures: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")


def read_log(folder: Path) -> list[Mapping[str, Any]]:
    """The lines of a run's log; one that a kill has cut short is left out."""
    path = folder / _LOG
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _option(name: str) -> str:
    return "--" + {"sources": "from-layers", "prompts": "no-prompts"}.get(name, name).replace("_", "-")
