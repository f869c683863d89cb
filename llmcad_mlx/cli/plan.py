"""`llmcad-mlx plan`: what a memory budget is spent on, and the speed to expect from it."""

from __future__ import annotations

import json

from llmcad_mlx.cli import options


def plan(
    target: options.Target = None,
    draft: options.Draft = "auto",
    memory: options.Memory = None,
    pinned: options.Pinned = "auto",
    context: options.Context = None,
    read_bandwidth: options.ReadBandwidth = None,
    json_output: options.Json = False,
) -> None:
    """Show what a memory budget is spent on, predict the speed, and say what more memory would buy."""
    from llmcad_mlx.cli.tables import print_tables
    from llmcad_mlx.loader import conditions, plan_pair
    from llmcad_mlx.measure.forecast import make_forecast
    from llmcad_mlx.measure.plan_report import plan_json, plan_notes, plan_tables
    from llmcad_mlx.settings import MemoryOptions
    from llmcad_mlx.store.names import find_pair

    where = MemoryOptions.of(memory, pinned, context, read_bandwidth)
    names = find_pair(target, draft, not json_output, conditions(where))
    pair = plan_pair(names, where)
    forecast = make_forecast(pair)
    if json_output:
        print(json.dumps(plan_json(pair, forecast)))
    else:
        print_tables(plan_tables(pair, forecast), plan_notes(pair, forecast))
