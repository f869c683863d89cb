"""`llmcad-mlx plan`: what a memory budget is spent on, and the speed to expect from it."""

from __future__ import annotations

from llmcad_mlx.cli import options


def plan(
    *,
    pair: options.Pair,
    memory: options.Memory,
    json_output: options.Json = False,
) -> None:
    """Show what a memory budget is spent on, predict the speed, and say what more memory would buy."""
    from llmcad_mlx.cli.measuring import publish
    from llmcad_mlx.loader import conditions, plan_pair
    from llmcad_mlx.measure.plan import make_forecast, plan_report
    from llmcad_mlx.store.names import find_pair

    names = find_pair(pair.target, pair.draft, not json_output, conditions(memory))
    planned = plan_pair(names, memory)
    publish(plan_report(planned, make_forecast(planned)), json_output)
