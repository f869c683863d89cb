"""The command line: text, figures, JSON, and what Ctrl-C and a closed pipe do."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import Engine, load
from llmcad_mlx.cli.generate import PromptProgress
from llmcad_mlx.cli.main import run
from llmcad_mlx.settings import GenerationOptions
from tests.support.tiny_folder import EOS, make_folder

CONTRACT = {
    "text", "tokens", "finish_reason", "prompt_tokens", "generated_tokens", "seed", "policy", "device", "emulated",
    "target_passes", "drafted", "tested", "accepted", "tokens_per_pass", "acceptance_rate",
    "prompt_s", "decode_s", "tokens_per_s", "draft_s", "verify_s", "io_wait_s", "other_s", "streamed_bytes",
    "budget_bytes", "pinned_bytes", "peak_rss_bytes", "peak_mlx_bytes",
}  # fmt: skip
PROMPT = "then the other one ran in and then"
# Also where the tests run in the background, whose processes ignore Ctrl-C.
CHILD = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from llmcad_mlx.cli.main import main; main()"
)

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def endless(folder: Path) -> Path:
    """A model with room for as many tokens as a test wants to interrupt, which never ends a text by itself."""
    path = make_folder(folder.parent / "endless", context=10_000_000)
    config = json.loads((path / "config.json").read_text())
    assert config.pop("eos_token_id") == EOS
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    del tokenizer["eos_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., str]:
    """The text of plain decoding through the Python API."""

    def text(prompt: Any, **options: Any) -> str:
        with load(folder, None) as engine:
            return engine.generate(prompt, **options).text

    return text


@pytest.fixture
def output(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Run a command that succeeds; its stdout and stderr."""

    def call(*argv: object) -> tuple[str, str]:
        capfd.readouterr()
        assert run([str(word) for word in argv]) == 0
        return capfd.readouterr()

    return call


# --- Text and figures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "chain", "paper", "throughput"])
def test_text_on_stdout_figures_on_stderr(
    folder: Path, draft: Path, output: Callable[..., tuple[str, str]], expected: Callable[..., str], policy: str
) -> None:
    words = ["--target", folder, "--draft", draft, "--policy", policy, "-m", "20"]
    out, err = output("generate", PROMPT, *words)
    assert out == expected([{"role": "user", "content": PROMPT}], max_tokens=20) + "\n"
    assert err.count("\n") == 1
    assert err.startswith("[prompt ")
    assert "generated 20 tokens" in err
    for figure in ("tokens/s", "tokens per pass", "acceptance", "target passes"):
        assert figure in err


def test_prompt_sources_and_templates(
    folder: Path,
    tmp_path: Path,
    output: Callable[..., tuple[str, str]],
    expected: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = ["--target", folder, "-m", "8"]
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    chat = expected([{"role": "user", "content": PROMPT}], max_tokens=8) + "\n"
    assert output("generate", "--prompt-file", file, *target)[0] == chat
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert output("generate", "-", *target)[0] == chat
    with_system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    assert (
        output("generate", PROMPT, "--system", "be brief", *target)[0]
        == expected(with_system, max_tokens=8) + "\n"
    )
    raw = expected(PROMPT, max_tokens=8) + "\n"
    assert output("generate", "--raw", PROMPT, *target)[0] == raw != chat

    base = make_folder(tmp_path / "base", template=False)
    assert output("generate", PROMPT, "--target", base, "-m", "8")[0] == raw


def test_options_reach_the_engine(
    folder: Path, output: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[GenerationOptions] = []
    stream_generate = Engine.stream_generate

    def spy(self: Engine, prompt: Any, on_progress: Any, *, options: GenerationOptions) -> Any:
        seen.append(options)
        return stream_generate(self, prompt, on_progress, options=options)

    monkeypatch.setattr(Engine, "stream_generate", spy)
    words = (
        "--policy paper --tree-nodes 5 --max-tokens 6 --temp 0.7 --top-p 0.9 --top-k 30 --min-p 0.01 --seed 9 "
        "--repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3 --stop QQ --stop ZZ "
        "--no-pipeline --no-tree --no-fallback"
    )
    output("generate", PROMPT, "--target", folder, *words.split())
    assert seen == [GenerationOptions.of(
        policy="paper", tree_nodes=5, max_tokens=6, temperature=0.7, top_p=0.9, top_k=30, min_p=0.01, seed=9,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3, stop=["QQ", "ZZ"], pipeline=False,
        tree=False, fallback=False,
    )]  # fmt: skip


def test_a_streamed_answer_tells_what_was_read(
    folder: Path,
    output: Callable[..., tuple[str, str]],
    expected: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmcad_mlx.streaming.weights.SMALL_BYTES", 0)
    where = ("--target", folder, "--raw", "--max-tokens", "8", "--pinned", "0", "--read-bandwidth", "50MB/s")
    text, figures = output("generate", PROMPT, *where)
    assert text == expected(PROMPT, max_tokens=8) + "\n"
    assert " pinned" in figures
    assert "reads emulated at 50 MB/s" in figures
    report = json.loads(output("generate", PROMPT, *where, "--json")[0])
    assert report["emulated"] is True
    assert report["streamed_bytes"] > 8 * 1000
    assert report["budget_bytes"] is None


# --- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["plain", "chain", "paper", "throughput"])
def test_json_is_the_contract_and_nothing_else(
    folder: Path, draft: Path, output: Callable[..., tuple[str, str]], expected: Callable[..., str], policy: str
) -> None:
    words = ["--target", folder, "--draft", draft, "--policy", policy, "-m", "20", "--seed", "7", "--json"]
    out, err = output("generate", PROMPT, *words)
    assert err == ""
    assert out.count("\n") == 1
    report = json.loads(out)
    assert set(report) == CONTRACT
    assert report["text"] == expected([{"role": "user", "content": PROMPT}], max_tokens=20)
    assert (report["generated_tokens"], len(report["tokens"]), report["finish_reason"]) == (20, 20, "length")
    assert (report["seed"], report["policy"], report["emulated"]) == (7, policy, False)
    parts = report["draft_s"] + report["verify_s"] + report["io_wait_s"] + report["other_s"]
    assert parts == pytest.approx(report["decode_s"])
    assert report["tokens_per_s"] == pytest.approx(20 / report["decode_s"])
    assert report["tokens_per_pass"] == pytest.approx(20 / report["target_passes"])
    assert 0 <= report["accepted"] <= report["tested"] <= report["drafted"]
    assert 0 <= report["acceptance_rate"] <= 1
    assert report["prompt_tokens"] > len("assistant")
    for name in ("prompt_s", "verify_s", "pinned_bytes", "peak_rss_bytes", "peak_mlx_bytes"):
        assert report[name] > 0, name
    if policy in ("chain", "paper"):
        assert report["draft_s"] > 0


def test_json_of_a_text_that_a_stop_string_ended(
    folder: Path, output: Callable[..., tuple[str, str]], expected: Callable[..., str]
) -> None:
    full = expected(PROMPT, max_tokens=30)
    words = ["--raw", PROMPT, "--target", folder, "-m", "30", "--json", "--stop", full[6:9]]
    report = json.loads(output("generate", *words)[0])
    assert report["finish_reason"] == "stop"
    assert report["text"] == full[: full.index(full[6:9])]


# --- Interrupted --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_keeps_what_there_is(
    folder: Path,
    expected: Callable[..., str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    as_json: bool,
) -> None:
    stream_generate, begin = Engine.stream_generate, expected(PROMPT, max_tokens=5)

    def interrupted(self: Engine, prompt: Any, on_progress: Any, **options: Any) -> Any:
        for response in stream_generate(self, prompt, on_progress, **options):
            yield response
            if response.generation_tokens == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream_generate", interrupted)
    words = ["generate", "--raw", PROMPT, "--target", str(folder), "--policy", "plain"]
    assert run([*words, "--json"] if as_json else words) == 130
    out, err = capfd.readouterr()
    text = json.loads(out)["text"] if as_json else out.removesuffix("\n")
    assert text
    assert begin.startswith(text)
    assert err == "interrupted\n"
    if as_json:
        report = json.loads(out)
        assert set(report) == CONTRACT
        assert (report["finish_reason"], report["generated_tokens"]) == ("interrupted", 5)


def test_an_error_in_the_middle_keeps_the_text(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_generate = Engine.stream_generate

    def failing(self: Engine, prompt: Any, on_progress: Any, **options: Any) -> Any:
        for response in stream_generate(self, prompt, on_progress, **options):
            if response.generation_tokens == 8:
                raise RuntimeError("broke")
            yield response

    monkeypatch.setattr(Engine, "stream_generate", failing)
    words = ["generate", "--raw", PROMPT, "--target", str(folder)]
    assert run(words) == 1
    out, err = capfd.readouterr()
    assert len(out) > 2
    assert out.endswith("\n")
    assert err == "error: RuntimeError: broke; run again with --debug for details\n"
    assert run([*words, "--json"]) == 1
    assert capfd.readouterr().out == ""  # a failed command has no result


def start(*argv: object, **pipes: Any) -> subprocess.Popen[bytes]:
    """The command line in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, argv)], stdout=subprocess.PIPE, **pipes)


def test_ctrl_c_while_decoding(endless: Path) -> None:
    child = start("generate", PROMPT, "--target", endless, "-m", "-1", stderr=subprocess.PIPE)
    assert child.stdout is not None
    first = child.stdout.read(40)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert child.returncode == 130
    assert err == b"interrupted\n"
    assert len(first) == 40
    assert (first + out).endswith(b"\n")


def test_ctrl_c_while_the_prompt_is_read(endless: Path, tmp_path: Path) -> None:
    """On a terminal, where progress shows that the prompt is being processed."""
    prompt = tmp_path / "long.txt"
    prompt.write_text("the long story " * 20_000)
    terminal, stderr = pty.openpty()
    child = start("generate", "--prompt-file", prompt, "--target", endless, stderr=stderr)
    os.close(stderr)
    shown = b""
    while b"prompt: " not in shown:
        shown += os.read(terminal, 4096)
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    shown += read_all(terminal)
    assert child.returncode == 130
    assert out == b""
    assert shown.endswith(b"\r\x1b[Kinterrupted\r\n")  # the progress line is gone
    assert b"Traceback" not in shown


def read_all(terminal: int) -> bytes:
    """What is left to read after the other end was closed."""
    read = b""
    try:
        while more := os.read(terminal, 4096):
            read += more
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    return read


def test_a_reader_that_goes_away_is_no_error(endless: Path) -> None:
    child = start("generate", PROMPT, "--target", endless, "-m", "-1", stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.read(10)
    child.stdout.close()
    assert child.wait(timeout=30) == 128 + signal.SIGPIPE
    assert child.stderr.read() == b""
    child.stderr.close()


# --- Progress -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "enabled"), [(io.StringIO, True), (Terminal, False), (Terminal, True)])
def test_progress_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], enabled: bool
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("llmcad_mlx.cli.generate._SHOW_AFTER_S", -1.0)
    with closing(PromptProgress(enabled)) as on_progress:
        on_progress(10, 20)
        on_progress(20, 20)
    if stream is Terminal and enabled:
        assert shown.getvalue() == "\rprompt: 10/20 tokens\rprompt: 20/20 tokens\r\x1b[K"
    else:
        assert shown.getvalue() == ""


def test_short_prompts_show_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with closing(PromptProgress(True)) as on_progress:
        on_progress(10, 20)
    assert shown.getvalue() == ""
