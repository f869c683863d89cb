"""A generation as the JSON object of the command line's contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from llmcad_mlx.api import Engine
from llmcad_mlx.machine import peak_rss_bytes
from llmcad_mlx.results import GenerationStats
from llmcad_mlx.store.names import device_name


def generation_report(
    engine: Engine,
    text: str,
    tokens: Sequence[int],
    finish_reason: str | None,
    stats: GenerationStats,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All keys of the contract. Bytes in bytes, times in seconds; a budget of null means no limit was set."""
    plan = engine.pair.plan
    return {
        "text": text,
        "tokens": list(tokens),
        "finish_reason": finish_reason,
        "prompt_tokens": stats.prompt_tokens,
        "generated_tokens": len(tokens),
        "seed": options.get("seed", 0),
        "policy": options.get("policy", "throughput"),
        "device": device_name(),
        "emulated": engine.pair.options.read_bandwidth is not None,
        "target_passes": stats.target_passes,
        "drafted": stats.drafted,
        "tested": stats.tested,
        "accepted": stats.accepted,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance_rate": stats.acceptance_rate,
        "prompt_s": stats.prompt_s,
        "decode_s": stats.decode_s,
        "tokens_per_s": stats.tokens_per_s,
        "draft_s": stats.draft_s,
        "verify_s": stats.verify_s,
        "io_wait_s": stats.io_wait_s,
        "other_s": stats.other_s,
        "streamed_bytes": stats.streamed_bytes,
        "budget_bytes": None if plan is None else plan.budget_bytes,
        "pinned_bytes": engine.pair.target.model.weight_bytes if plan is None else plan.pinned_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_mlx_bytes": mx.get_peak_memory(),
    }
