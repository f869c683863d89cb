"""`llmcad-mlx plan`: what a memory budget is spent on, and the speed to expect from it."""

from __future__ import annotations

import json

from llmcad_mlx.cli import options


def plan(
    *,
    pair: options.Pair,
    memory: options.Memory,
    json_output: options.Json = False,
) -> None:
    """Show what a memory budget is spent on, predict the speed, and say what more memory would buy."""
    from llmcad_mlx.cli.tables import print_tables
    from llmcad_mlx.loader import conditions, plan_pair
    from llmcad_mlx.measure.forecast import make_forecast
    from llmcad_mlx.measure.plan_report import plan_json, plan_notes, plan_tables
    from llmcad_mlx.store.names import find_pair

    names = find_pair(pair.target, pair.draft, not json_output, conditions(memory))
    planned = plan_pair(names, memory)
    forecast = make_forecast(planned)
    if json_output:
        print(json.dumps(plan_json(planned, forecast)))
    else:
        print_tables(plan_tables(planned, forecast), plan_notes(planned, forecast))
