"""Speeds by the formulas of DESIGN 3.7, and the plans of larger budgets. Numbers on paper."""

from __future__ import annotations

import pytest

from llmcad_mlx.memory import MemoryNeeds, ModelSizes, make_plan
from llmcad_mlx.memory.forecast import Measured, ReadRate, Speeds, larger_plans

MB = 10**6


def test_speeds_by_the_formulas() -> None:
    measured = Measured(4.0, 16.0, 0.5, 0.2, 0.1, None, 10)
    speeds = Speeds.of(100, ReadRate(100.0), measured)  # a second of reading
    assert speeds == Speeds(pytest.approx(4 / 1.1), 4.0, 1.0, 1.0)
    speeds = Speeds.of(10, ReadRate(100.0), measured)  # computing takes longer
    assert speeds == Speeds(pytest.approx(4 / 0.6), pytest.approx(40.0), pytest.approx(5.0), pytest.approx(10.0))
    assert Speeds.of(0, None, measured) == Speeds(pytest.approx(4 / 0.6), None, pytest.approx(5.0), None)
    assert Speeds.of(50, ReadRate(100.0), None) == Speeds(None, None, None, 2.0)


def test_larger_budgets_are_planned_as_loading_would() -> None:
    """With a model large enough that the steps differ."""
    sizes = ModelSizes((300 * MB,) * 20, 0, 100 * MB, 100 * MB, 1000, 1000, 64, 64)
    needs = MemoryNeeds(sizes, 4096, 1024, runtime_bytes=200 * MB)
    now = make_plan(needs, 3000 * MB)
    rows = list(larger_plans(needs, now))
    assert [name for name, _ in rows] == ["+25 %", "+50 %", "+100 %", "all resident"]
    for (_, plan), budget in zip(rows, (3750, 4500, 6000), strict=False):
        assert plan == make_plan(needs, budget * MB)
    streamed = [now.streamed_bytes, *(plan.streamed_bytes for _, plan in rows)]
    assert streamed == sorted(set(streamed), reverse=True)
    assert streamed[-1] == 0
    last = rows[-1][1]
    assert make_plan(needs, last.budget_bytes) == last
