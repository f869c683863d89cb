"""What `plan` shows: what memory is spent on, the speed to expect, what more memory or a smaller draft would buy.

The formulas are those of `memory`. W, the bytes of a pass, comes from the plan; the read rate B from the
options or from reading some of them; A, C, D and N are what this pair's own rounds were like on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from llmcad_mlx.loader import PlannedPair
from llmcad_mlx.measure.output import NOTHING, Report, Table, milliseconds, number
from llmcad_mlx.measure.sketch import SketchedPair
from llmcad_mlx.memory import (
    Measured,
    MemoryPlan,
    ReadRate,
    Speeds,
    larger_plans,
    smaller_drafts,
)
from llmcad_mlx.sizes import format_size
from llmcad_mlx.store.names import PairPaths, device_name, own_draft_name, pair_profile_path
from llmcad_mlx.store.profile import PairProfile
from llmcad_mlx.streaming.ways import measure_read_rate

NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan and its speeds. `name`: what is different."""

    name: str
    plan: MemoryPlan
    speeds: Speeds


@dataclass(frozen=True, slots=True)
class Forecast:
    """A planned pair's future. `rate`: None where nothing is read. `larger`: with more memory; `drafts`: with
    other drafts, of which nothing is measured."""

    rate: ReadRate | None
    measured: Measured | None
    speeds: Speeds
    larger: Sequence[Alternative]
    drafts: Sequence[Alternative]


def make_forecast(pair: PlannedPair | SketchedPair) -> Forecast:
    """Predict. Reads some of the streamed weights where no rate was given. Raises StorageError."""
    given, rate = pair.options.read_bandwidth, None
    measured = find_measured(pair.names, pair.plan, given)
    if given is not None:
        rate = ReadRate(given, emulated=True)
    elif pair.reads:
        rate = measure_read_rate(pair.reads)

    def speeds(plan: MemoryPlan) -> Speeds:
        """Measured with that very plan, or what follows from the rate alone."""
        return Speeds.of(plan.streamed_bytes, rate, find_measured(pair.names, plan, given))

    larger = larger_plans(pair.needs, pair.plan)
    drafts = smaller_drafts(pair.needs, pair.plan, pair.options.pinned)
    return Forecast(
        rate=rate,
        measured=measured,
        speeds=Speeds.of(pair.plan.streamed_bytes, rate, measured),
        larger=[Alternative(name, plan, speeds(plan)) for name, plan in larger],
        drafts=[Alternative(name, plan, Speeds.of(plan.streamed_bytes, rate, None)) for name, plan in drafts],
    )


def find_measured(names: PairPaths, plan: MemoryPlan, read_bandwidth: float | None) -> Measured | None:
    """From the saved profile of this pair with so many streamed bytes; None where it never ran so. What was
    learned with other bytes says little: trees, passes and waiting are others."""
    costs = PairProfile(pair_profile_path(names, plan.streamed_bytes, read_bandwidth)).costs
    totals = costs.totals
    if not totals.rounds or not costs.computing:
        return None
    nodes = totals.rows / totals.rounds
    return Measured(
        tokens_per_pass=totals.tokens / totals.rounds,
        nodes=nodes,
        pass_s=costs.computing.predict(max(round(nodes), 1)),
        plain_pass_s=costs.computing.predict(1),
        rest_s=totals.rest_s / totals.rounds,
        draft_step_s=costs.draft.predict(1) if costs.draft else None,
        streamed_bytes=plan.streamed_bytes or None,
    )


def plan_report(pair: PlannedPair | SketchedPair, forecast: Forecast) -> Report:
    """The budget, the speed and what would change it; the document in bytes, bytes per second, tokens per second;
    null: not known, or no limit."""
    plan, names = pair.plan, pair.names
    document = {
        "target": str(names.target_path),
        "draft": own_draft_name(names.draft_name),
        "device": device_name(),
        "estimated": pair.estimated,
        "emulated": pair.options.read_bandwidth is not None,
        **_plan_json(plan, forecast.speeds),
        "parts": budget_parts(pair),
        "num_layers": len(pair.needs.sizes.layer_bytes),
        "pinned_layers": list(plan.pinned_layers),
        "pin_head": plan.pin_head,
        "pin_embedding": plan.pin_embedding,
        "read_rate": None if forecast.rate is None else asdict(forecast.rate),
        "measured": None if forecast.measured is None else asdict(forecast.measured),
        "larger": [{"name": row.name, **_plan_json(row.plan, row.speeds)} for row in forecast.larger],
        "drafts": [{"name": row.name, **_plan_json(row.plan, row.speeds)} for row in forecast.drafts],
    }
    return Report("plan", _tables(pair, forecast), _notes(pair, forecast), document)


_PLAN_FIELDS = (
    "budget_bytes", "total_bytes", "pinned_bytes", "streamed_bytes", "context", "max_nodes", "prefill_chunk",
    "num_buffers",
)  # fmt: skip


def _plan_json(plan: MemoryPlan, speeds: Speeds) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in _PLAN_FIELDS} | {"tokens_per_s": asdict(speeds)}


def budget_parts(pair: PlannedPair | SketchedPair) -> dict[str, int]:
    """What the plan adds up to, part by part."""
    plan, sizes = pair.plan, pair.needs.sizes
    head = {} if sizes.tied else {"pinned head": sizes.head_bytes * plan.pin_head}
    embedding = "pinned embedding, also the head" if sizes.tied else "pinned embedding"
    return {
        "interpreter and libraries": plan.runtime_bytes,
        "draft weights": plan.draft_bytes - plan.draft_kv_bytes,
        "draft KV": plan.draft_kv_bytes,
        "target KV": plan.kv_bytes,
        "logits and activations": plan.work_bytes,
        "stream buffers": plan.buffer_bytes,
        "small weights": plan.resident_bytes,
        "pinned layers": sum(sizes.layer_bytes[number] for number in plan.pinned_layers),
        **head,
        embedding: sizes.embedding_bytes * plan.pin_embedding,
    }


def _tables(pair: PlannedPair | SketchedPair, forecast: Forecast) -> list[Table]:
    plan = pair.plan
    names = (
        "speculative, A / (max(W/B, C) + D)",
        "at most, A·B/W",
        "plain, 1 / max(W/B, C)",
        "plain streamer at most, B/W",
    )
    title = "predicted speed (emulated)" if pair.options.read_bandwidth else "predicted speed"
    reads = plan.streamed_bytes > 0
    speeds = [
        NOT_MEASURED if figure is None and is_meant else number(figure, 2)
        for figure, is_meant in zip(astuple(forecast.speeds), (True, reads, True, reads), strict=True)
    ]
    tables = [_budget_table(pair), Table(title, ("", "tokens per s"), tuple(zip(names, speeds, strict=True)))]
    if forecast.larger:
        header = ("memory", "budget", "pinned", "streamed per pass", "tokens per s", "at most", "plain", "at most")
        rows = []
        for row in (Alternative("now", plan, forecast.speeds), *forecast.larger):
            sizes = (row.plan.budget_bytes, row.plan.pinned_bytes, row.plan.streamed_bytes)
            rows.append((row.name, *map(_megabytes, sizes), *_figures(row.speeds)))
        tables.append(Table("more memory", header, tuple(rows)))
    if forecast.drafts:
        columns = ("draft", "frees", "pinned", "streamed per pass", "plain", "at most")
        rows = []
        for row in forecast.drafts:
            pinned = row.plan.pinned_bytes
            sizes = (pinned - plan.pinned_bytes, pinned, row.plan.streamed_bytes)
            rows.append((row.name, *map(_megabytes, sizes), *_figures(row.speeds)[2:]))
        tables.append(Table("smaller drafts", columns, tuple(rows)))
    return tables


def _budget_table(pair: PlannedPair | SketchedPair) -> Table:
    plan = pair.plan
    details = {
        "draft KV": f"{plan.context} tokens",
        "target KV": f"{plan.context} tokens",
        "stream buffers": f"{plan.num_buffers}" if plan.buffer_bytes else NOTHING,
        "pinned layers": f"{len(plan.pinned_layers)} of {len(pair.needs.sizes.layer_bytes)}",
    }
    sizes, total = budget_parts(pair), plan.total_bytes
    if plan.budget_bytes is not None:
        sizes, total = sizes | {"spare": plan.spare_bytes}, plan.budget_bytes
    sizes |= {"total": total, "streamed per pass": plan.streamed_bytes}
    title = f"{pair.names.target_label}, draft {pair.names.draft_label}{' (estimated)' if pair.estimated else ''}"
    rows = tuple((name, details.get(name, ""), _megabytes(size)) for name, size in sizes.items())
    return Table(title, ("memory", "", "size"), rows)


def _figures(speeds: Speeds) -> list[str]:
    return [number(figure, 2) for figure in astuple(speeds)]


def _megabytes(num_bytes: int | None) -> str:
    """A column of sizes in one unit can be added up."""
    return number(None if num_bytes is None else num_bytes / 1e6, 1, " MB")


def _notes(pair: PlannedPair | SketchedPair, forecast: Forecast) -> list[str]:
    plan = pair.plan
    notes = ["No budget is set: --memory 6GB sets one."] if plan.budget_bytes is None else []
    if pair.estimated:
        notes.append("Sizes are estimated from config.json: weights of target or draft are not on this machine.")
    notes += [
        f"Room for {plan.context} tokens of context, trees of {plan.max_nodes} nodes, "
        f"prompt chunks of {plan.prefill_chunk} tokens.",
        _rate_note(forecast.rate, plan),
        _measured_note(forecast.measured),
    ]
    if forecast.larger:
        notes.append(
            "Other plans have speeds once they have run: what was measured with one says little of others."
        )
    if forecast.larger and pair.options.pinned is not None:
        notes.append("Larger budgets are spent as --pinned auto would.")
    return notes


def _rate_note(rate: ReadRate | None, plan: MemoryPlan) -> str:
    if rate is None and plan.streamed_bytes:
        return "B is not measured: there are no weights to read yet; --read-bandwidth states a rate."
    if rate is None:
        return "Nothing is read while decoding."
    figure = f"B = {format_size(round(rate.bytes_per_s))}/s"
    if rate.emulated:
        return f"{figure}, emulated (--read-bandwidth)."
    sample = f"{figure}, measured by reading {format_size(rate.sampled_bytes)} of the streamed weights"
    if rate.from_disk:
        return f"{sample}, of which the page cache held nothing."
    return f"{sample}; they may have come from the page cache, and the disk may be slower."


def _measured_note(measured: Measured | None) -> str:
    if measured is None:
        return (
            "A, C and D are not measured yet for this pair: run generate with the same options, then plan again."
        )
    where = "all weights in memory" if measured.streamed_bytes is None else "this plan"
    step = "" if measured.draft_step_s is None else f"; a draft step takes {milliseconds(measured.draft_step_s)}"
    return (
        f"A = {measured.tokens_per_pass:.2f} tokens per pass of {measured.nodes:.1f} nodes, "
        f"C = {milliseconds(measured.pass_s)} computing a pass ({milliseconds(measured.plain_pass_s)} with one "
        f"node), D = {milliseconds(measured.rest_s)} beside it; measured with {where}{step}."
    )
