"""What lies in examples/ can be used as it is: the programs run, on the embedded model or without a server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from llmcad_mlx.measure.workload import load_prompts
from llmcad_mlx.store.names import DEFAULT_PRESET, resolve_target

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.name)
def test_prompt_files_are_ones_that_bench_takes(file: Path) -> None:
    assert len(load_prompts(file)) >= 4


def test_forty_prompts_of_four_domains() -> None:
    prompts = load_prompts(EXAMPLES / "four_domains.toml")
    assert Counter(prompt.domain for prompt in prompts) == {
        "chat": 10,
        "code": 10,
        "summarising": 10,
        "translation": 10,
    }


# --- Programs -----------------------------------------------------------------------------------------------


def run_example(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run as a user runs it."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def printed_by(name: str, *arguments: str, **environment: str) -> str:
    done = run_example(name, *arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def embedded() -> None:
    """The model is there, so that no program says that it fetches it."""
    resolve_target(DEFAULT_PRESET)


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded")
def test_first_words() -> None:
    text = printed_by("first_words.py", "What is the capital of France?")
    assert "Paris" in text
    assert re.search(r"\d+ tokens in \d+ passes of the target: \d+\.\d tokens/s\n$", text)


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded")
def test_bigger_than_memory() -> None:
    text = printed_by("bigger_than_memory.py")
    assert "quick brown fox" in text
    pinned, streamed, in_all = (
        int(found) for found in re.findall(r"^(?:pinned|streamed|read): (\d+) MB", text, re.MULTILINE)
    )
    (passes,) = re.findall(r"in (\d+) passes", text)
    assert 0 < pinned <= 30
    assert streamed > 40
    assert in_all >= (streamed - 1) * int(passes)


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded")
def test_bigger_than_memory_says_which_budget_is_too_small() -> None:
    done = run_example("bigger_than_memory.py", "50MB")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"memory: 50 MB is too little; the smallest that works is \d+ MB .*\n$", done.stderr)


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded")
def test_your_own_drafter() -> None:
    text = printed_by("your_own_drafter.py")
    assert "The capital of France is Paris." in text
    without, with_phrases = (int(found) for found in re.findall(r"(\d+)(?: passes|, the same)", text))
    assert with_phrases < without
    assert text.endswith("the same tokens: True\n")


@pytest.mark.embedded
@pytest.mark.usefixtures("embedded")
def test_mlx_lm_drop_in() -> None:
    text = printed_by("mlx_lm_drop_in.py")
    assert "quick brown fox" in text
    drafted = re.search(r"(\d+) tokens at \d+\.\d tokens/s, (\d+) of them drafted\n$", text)
    assert drafted is not None
    assert 0 < int(drafted[2]) < int(drafted[1])


def test_ipad_client_without_a_server_says_what_is_missing() -> None:
    done = run_example("ipad_client.py", "http://127.0.0.1:9")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is `llmcad-mlx serve` running there?" in done.stderr


def test_every_program_is_run_here() -> None:
    source = Path(__file__).read_text()
    for program in EXAMPLES.glob("*.py"):
        assert f'"{program.name}"' in source, f"{program.name} has no test"
