"""What lies in examples/ can be used as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmcad_mlx.bench.prompts import load_prompts

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.name)
def test_prompt_files_are_ones_that_bench_takes(file: Path) -> None:
    assert len(load_prompts(file)) >= 4


def test_forty_prompts_of_four_domains() -> None:
    prompts = load_prompts(EXAMPLES / "four_domains.toml")
    counts = {domain: sum(p.domain == domain for p in prompts) for domain in {p.domain for p in prompts}}
    assert counts == {"chat": 10, "code": 10, "summarising": 10, "translation": 10}
