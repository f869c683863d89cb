"""A plan for models whose weights are not on this machine. What cannot be known that way is left out: how fast
anything is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmcad_mlx.estimate import ModelEstimate, draft_by_name, estimate_needs
from llmcad_mlx.files import user_path
from llmcad_mlx.loader import budget_for, release_free_memory
from llmcad_mlx.memory import MemoryNeeds, MemoryPlan, make_plan
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.names import PairPaths, published_config
from llmcad_mlx.streaming.stream import Read


@dataclass(frozen=True, slots=True)
class SketchedPair:
    """A pair with its memory plan, estimated; nothing of it need be on this machine."""

    names: PairPaths
    options: MemoryOptions
    needs: MemoryNeeds
    plan: MemoryPlan
    reads: ClassVar[tuple[Read, ...]] = ()
    estimated: ClassVar[bool] = True


def sketch_pair(target: str, draft: str, options: MemoryOptions) -> SketchedPair:
    """Plan from the configurations of a target and of a draft that is not "auto".

    Raises BudgetError, ModelError for a configuration that describes no model, and DownloadError.
    """
    config = published_config(target, "target")
    model = ModelEstimate.of(config, target)
    draft_model = draft_by_name(draft, config)
    release_free_memory()
    needs = estimate_needs(model, draft_model, options)
    budget = budget_for(model.num_bytes + draft_model.num_bytes, options)
    names = PairPaths(user_path(target), draft, None, target)
    return SketchedPair(names, options, needs, make_plan(needs, budget, options.pinned))
