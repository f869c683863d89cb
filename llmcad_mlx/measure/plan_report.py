"""A memory plan and its forecast as tables, notes and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llmcad_mlx.loader import PlannedPair
from llmcad_mlx.measure.forecast import Alternative, Forecast, Measured, ReadRate, Speeds
from llmcad_mlx.measure.tables import NOTHING, Table, number
from llmcad_mlx.memory.plan import MemoryPlan
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import device_name

_SPEED_HEADER = ("tokens per s", "at most", "plain", "at most")


def plan_tables(pair: PlannedPair, forecast: Forecast) -> list[Table]:
    """The budget, the speed, and what would change it."""
    tables = [_budget_table(pair), _speed_table(pair, forecast)]
    if forecast.larger:
        header = ("memory", "budget", "pinned", "streamed per pass", *_SPEED_HEADER)
        rows = (Alternative("now", pair.plan, forecast.speeds), *forecast.larger)
        tables.append(Table("more memory", header, tuple(_larger_row(row) for row in rows)))
    if forecast.drafts:
        columns = ("draft", "frees", "pinned", "streamed per pass", "plain", "at most")
        tables.append(
            Table("smaller drafts", columns, tuple(_draft_row(row, pair.plan) for row in forecast.drafts))
        )
    return tables


def plan_notes(pair: PlannedPair, forecast: Forecast) -> list[str]:
    """Where the figures come from."""
    plan, notes = pair.plan, []
    if plan.budget_bytes is None:
        notes.append("No budget is set: --memory 6GB sets one.")
    notes.append(
        f"Room for {plan.context} tokens of context, trees of {plan.max_nodes} nodes, "
        f"prompt chunks of {plan.prefill_chunk} tokens."
    )
    notes.append(_rate_note(forecast.rate))
    notes.append(_measured_note(forecast.measured, plan))
    if forecast.larger and pair.options.pinned is not None:
        notes.append("Larger budgets are spent as --pinned auto would.")
    return notes


def plan_json(pair: PlannedPair, forecast: Forecast) -> dict[str, Any]:
    """Everything in one object: bytes, bytes per second, tokens per second; null: not known, or no limit."""
    plan, names = pair.plan, pair.names
    return {
        "target": str(names.target_path),
        "draft": names.draft_name,
        "device": device_name(),
        "emulated": pair.options.read_bandwidth is not None,
        **_plan_json(plan),
        "parts": dict(budget_parts(pair)),
        "num_layers": len(pair.needs.sizes.layer_bytes),
        "pinned_layers": list(plan.pinned_layers),
        "pin_head": plan.pin_head,
        "pin_embedding": plan.pin_embedding,
        "read_rate": None if forecast.rate is None else asdict(forecast.rate),
        "measured": None if forecast.measured is None else asdict(forecast.measured),
        "tokens_per_s": asdict(forecast.speeds),
        "larger": [_alternative_json(row) for row in forecast.larger],
        "drafts": [_alternative_json(row) for row in forecast.drafts],
    }


def budget_parts(pair: PlannedPair) -> list[tuple[str, int]]:
    """What the plan adds up to, part by part."""
    plan, sizes = pair.plan, pair.needs.sizes
    layers = sum(sizes.layer_bytes[number] for number in plan.pinned_layers)
    parts = [
        ("interpreter and libraries", plan.runtime_bytes),
        ("draft weights", plan.draft_bytes - plan.draft_kv_bytes),
        ("draft KV", plan.draft_kv_bytes),
        ("target KV", plan.kv_bytes),
        ("logits and activations", plan.work_bytes),
        ("stream buffers", plan.buffer_bytes),
        ("small weights", plan.resident_bytes),
        ("pinned layers", layers),
    ]
    if sizes.tied:
        parts.append(("pinned embedding, also the head", sizes.embedding_bytes * plan.pin_embedding))
    else:
        parts.append(("pinned head", sizes.head_bytes * plan.pin_head))
        parts.append(("pinned embedding", sizes.embedding_bytes * plan.pin_embedding))
    return parts


def _budget_table(pair: PlannedPair) -> Table:
    plan, num_layers = pair.plan, len(pair.needs.sizes.layer_bytes)
    details = {
        "draft KV": f"{plan.context} tokens",
        "target KV": f"{plan.context} tokens",
        "stream buffers": f"{plan.num_buffers}" if plan.buffer_bytes else NOTHING,
        "pinned layers": f"{len(plan.pinned_layers)} of {num_layers}",
    }
    rows = [(name, details.get(name, ""), _exact(size)) for name, size in budget_parts(pair)]
    if plan.budget_bytes is not None:
        rows.append(("spare", "", _exact(plan.spare_bytes)))
    total = plan.total_bytes if plan.budget_bytes is None else plan.budget_bytes
    rows += [("total", "", _exact(total)), ("streamed per pass", "", _exact(plan.streamed_bytes))]
    title = f"{pair.names.target_path.name}, draft {pair.names.draft_name}"
    return Table(title, ("memory", "", "size"), tuple(rows))


def _speed_table(pair: PlannedPair, forecast: Forecast) -> Table:
    speeds = forecast.speeds
    rows = (
        ("speculative, A / (max(W/B, C) + D)", number(speeds.speculative, 2)),
        ("at most, A·B/W", number(speeds.speculative_bound, 2)),
        ("plain, 1 / max(W/B, C)", number(speeds.plain, 2)),
        ("plain streamer at most, B/W", number(speeds.plain_bound, 2)),
    )
    title = "predicted speed (emulated)" if pair.options.read_bandwidth else "predicted speed"
    return Table(title, ("", "tokens per s"), rows)


def _larger_row(row: Alternative) -> tuple[str, ...]:
    plan = row.plan
    budget = NOTHING if plan.budget_bytes is None else _exact(plan.budget_bytes)
    return (row.name, budget, _exact(plan.pinned_bytes), _exact(plan.streamed_bytes), *_speeds(row.speeds))


def _draft_row(row: Alternative, now: MemoryPlan) -> tuple[str, ...]:
    freed = row.plan.pinned_bytes - now.pinned_bytes
    plain = number(row.speeds.plain, 2), number(row.speeds.plain_bound, 2)
    return (row.name, _exact(freed), _exact(row.plan.pinned_bytes), _exact(row.plan.streamed_bytes), *plain)


def _speeds(speeds: Speeds) -> Sequence[str]:
    figures = speeds.speculative, speeds.speculative_bound, speeds.plain, speeds.plain_bound
    return [number(figure, 2) for figure in figures]


def _rate_note(rate: ReadRate | None) -> str:
    if rate is None:
        return "Nothing is read while decoding."
    figure = f"B = {format_size(round(rate.bytes_per_s))}/s"
    if rate.emulated:
        return f"{figure}, emulated (--read-bandwidth)."
    sample = f"{figure}, measured by reading {format_size(rate.sampled_bytes)} of the streamed weights"
    if rate.from_disk:
        return f"{sample} after the page cache had let go of them."
    return f"{sample}; they may have come from the page cache, and the disk may be slower."


def _measured_note(measured: Measured | None, plan: MemoryPlan) -> str:
    if measured is None:
        return "A, C and D are not measured yet for this pair: run generate, then plan again."
    where = "all weights in memory"
    if measured.streamed_bytes is not None:
        same = measured.streamed_bytes == plan.streamed_bytes
        where = "this plan" if same else f"{format_size(measured.streamed_bytes)} streamed per pass"
    step = "" if measured.draft_step_s is None else f"; a draft step takes {_milliseconds(measured.draft_step_s)}"
    return (
        f"A = {measured.tokens_per_pass:.2f} tokens per pass of {measured.nodes:.1f} nodes, "
        f"C = {_milliseconds(measured.pass_s)} computing a pass ({_milliseconds(measured.plain_pass_s)} with one "
        f"node), D = {_milliseconds(measured.rest_s)} beside it; measured with {where}{step}."
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _exact(num_bytes: int) -> str:
    """A column of sizes in one unit can be added up."""
    return f"{num_bytes / 1e6:.1f} MB"


def _alternative_json(row: Alternative) -> dict[str, Any]:
    return {"name": row.name, **_plan_json(row.plan), "tokens_per_s": asdict(row.speeds)}


def _plan_json(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "budget_bytes": plan.budget_bytes,
        "total_bytes": plan.total_bytes,
        "pinned_bytes": plan.pinned_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "context": plan.context,
        "max_nodes": plan.max_nodes,
        "prefill_chunk": plan.prefill_chunk,
        "num_buffers": plan.num_buffers,
    }
