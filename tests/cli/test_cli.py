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
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import Engine, load
from llmcad_mlx.cli.generate import PromptProgress
from llmcad_mlx.settings import GenerationOptions
from tests.support.command_line import TerminalText, read_all, start
from tests.support.tiny_folder import copy_folder, make_folder

CONTRACT = {
    "text", "tokens", "finish_reason", "prompt_tokens", "generated_tokens", "seed", "policy", "device", "emulated",
    "target_passes", "drafted", "tested", "accepted", "tokens_per_pass", "acceptance_rate",
    "prompt_s", "decode_s", "tokens_per_s", "draft_s", "verify_s", "io_wait_s", "other_s", "streamed_bytes",
    "near_ties", "budget_bytes", "pinned_bytes", "peak_rss_bytes", "peak_mlx_bytes",
}  # fmt: skip
Run = Callable[..., tuple[str, str]]
PROMPT = "then the other one ran in and then"
pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[..., str]:
    """The text of plain decoding through the Python API."""

    def text(prompt: Any, **options: Any) -> str:
        with load(folder, None) as engine:
            return engine.generate(prompt, **options).text

    return text


def test_text_on_stdout_figures_on_stderr(
    folder: Path, draft: Path, output: Run, expected: Callable[..., str]
) -> None:
    out, err = output("generate", PROMPT, "--target", folder, "--draft", draft, "-m", "20")
    assert out == expected([{"role": "user", "content": PROMPT}], max_tokens=20) + "\n"
    assert err.count("\n") == 1
    for figure in ("[prompt ", "generated 20 tokens", "tokens/s", "tokens per pass"):
        assert figure in err
    same, in_full = output("generate", PROMPT, "--target", folder, "--draft", draft, "-m", "20", "--stats")
    assert same == out
    for figure in ("[prompt ", "target passes", "acceptance", "drafting", "verifying", "memory", "drafted"):
        assert figure in in_full


@pytest.mark.parametrize("command", ["plan", "chat", "serve", "tune", "bench"])
def test_the_model_is_the_first_word_or_the_target(folder: Path, output: Run, command: str) -> None:
    told = output(command, folder, "--target", "other", code=2)[1]
    assert told == f"error: target: {folder} or other? Name one model, with --target or without\n"
    for words in ((folder,), ("--target", folder)):
        err = output(command, *words, "--memory", "1MB", *({"serve": ("--port", 0)}.get(command, ())), code=2)[1]
        assert "1 MB is too little" in err


def test_prompt_sources_and_templates(
    folder: Path, tmp_path: Path, output: Run, expected: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ["--target", folder, "-m", "8"]
    file = tmp_path / "prompt.txt"
    chat = expected([{"role": "user", "content": PROMPT}], max_tokens=8) + "\n"
    for encoding in ("utf-8", "utf-8-sig"):  # some editors begin a file with a mark of its encoding
        file.write_text(PROMPT, encoding=encoding)
        assert output("generate", "--prompt-file", file, *target)[0] == chat
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode(encoding))))
        assert output("generate", "-", *target)[0] == chat
    with_system = [{"role": "system", "content": "be brief"}, {"role": "user", "content": PROMPT}]
    brief = expected(with_system, max_tokens=8) + "\n"
    assert output("generate", PROMPT, "--system", "be brief", *target)[0] == brief
    raw = expected(PROMPT, max_tokens=8) + "\n"
    assert output("generate", "--raw", PROMPT, *target)[0] == raw != chat

    base = make_folder(tmp_path / "base", template=False)
    assert output("generate", PROMPT, "--target", base, "-m", "8")[0] == raw


TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}"
    "{% if quiet is false %}no thinking{% endif %}{{ spoken }}"
)


def test_variables_of_the_template(
    folder: Path, tmp_path: Path, output: Run, expected: Callable[..., str]
) -> None:
    model = copy_folder(folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    words = ["--target", model, "-m", "8"]
    for option, variables, text in (
        ("--chat-template-config", '{"quiet": false}', f"user {PROMPT}no thinking"),
        ("--chat-template-args", '{"quiet": false, "spoken": "x"}', f"user {PROMPT}no thinkingx"),
        ("--chat-template-config", "{}", f"user {PROMPT}"),
    ):
        answer = expected(text, max_tokens=8)
        assert output("generate", PROMPT, *words, option, variables)[0] == answer + "\n"
    base = make_folder(tmp_path / "base", template=False)
    config = ("--chat-template-config", '{"quiet": false}')
    told = output("generate", PROMPT, "--raw", *words, *config, code=2)[1]
    assert told == "error: chat-template-config: a raw prompt goes through no template; leave one of the two out\n"
    told = output("generate", PROMPT, "--target", base, *config, code=2)[1]
    assert told == "error: chat-template-config: this model has no chat template; leave it out\n"


def test_options_reach_the_engine(folder: Path, output: Run, monkeypatch: pytest.MonkeyPatch) -> None:
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
    folder: Path, output: Run, expected: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcad_mlx.streaming.weights.SMALL_BYTES", 0)
    where = ("--target", folder, "--raw", "--max-tokens", "8", "--pinned", "0", "--read-bandwidth", "50MB/s")
    text, figures = output("generate", PROMPT, *where)
    assert text == expected(PROMPT, max_tokens=8) + "\n"
    assert figures.count("\n") == 1
    assert "reads emulated at 50 MB/s" in figures
    assert " pinned" in output("generate", PROMPT, *where, "--stats")[1]
    report = json.loads(output("generate", PROMPT, *where, "--json")[0])
    assert report["emulated"] is True
    assert report["streamed_bytes"] > 8 * 1000
    assert report["budget_bytes"] is None


@pytest.mark.parametrize("policy", ["plain", "chain", "paper", "throughput"])
def test_json_is_the_contract_and_nothing_else(
    folder: Path, draft: Path, output: Run, expected: Callable[..., str], policy: str
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


@pytest.fixture
def breaking_off(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Make generations raise an error after so many tokens."""
    stream_generate = Engine.stream_generate

    def call(num_tokens: int, error: BaseException) -> None:
        def broken(self: Engine, prompt: Any, on_progress: Any, **options: Any) -> Any:
            yield from islice(stream_generate(self, prompt, on_progress, **options), num_tokens)
            raise error

        monkeypatch.setattr(Engine, "stream_generate", broken)

    return call


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_keeps_what_there_is(
    folder: Path, expected: Callable[..., str], output: Run, breaking_off: Any, as_json: bool
) -> None:
    begin = expected(PROMPT, max_tokens=5)
    breaking_off(5, KeyboardInterrupt())
    words = ["--raw", PROMPT, "--target", folder, "--policy", "plain", *(["--json"] if as_json else [])]
    out, err = output("generate", *words, code=130)
    text = out.removesuffix("\n")
    if as_json:
        report = json.loads(out)
        assert set(report) == CONTRACT
        assert (report["finish_reason"], report["generated_tokens"]) == ("interrupted", 5)
        text = report["text"]
    assert text
    assert begin.startswith(text)
    assert err == "interrupted\n"


def test_an_error_in_the_middle_keeps_the_text(folder: Path, output: Run, breaking_off: Any) -> None:
    breaking_off(7, RuntimeError("broke\noff"))
    words = ["generate", "--raw", PROMPT, "--target", folder]
    out, err = output(*words, code=1)
    assert len(out) > 2
    assert out.endswith("\n")
    assert err == "error: RuntimeError: broke off; run again with --debug for details\n"
    assert output(*words, "--json", code=1)[0] == ""  # a failed command has no result


def interrupt(child: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """Press Ctrl-C; what the command prints until it ends, which is soon."""
    sent = time.monotonic()
    child.send_signal(signal.SIGINT)
    printed = child.communicate(timeout=30)
    assert time.monotonic() - sent < 5
    assert child.returncode == 130
    return printed


def test_ctrl_c_while_decoding(endless: Path) -> None:
    child = start("generate", PROMPT, "--target", endless, "-m", "-1", stderr=subprocess.PIPE)
    first = child.stdout.read(40)
    out, err = interrupt(child)
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
    out, _ = interrupt(child)
    shown += read_all(terminal)
    assert out == b""
    assert shown.endswith(b"\r\x1b[Kinterrupted\r\n")  # the progress line is gone
    assert b"Traceback" not in shown


def test_a_reader_that_goes_away_is_no_error(endless: Path) -> None:
    with start("generate", PROMPT, "--target", endless, "-m", "-1", stderr=subprocess.PIPE) as child:
        child.stdout.read(10)
        child.stdout.close()
        assert child.wait(timeout=30) == 128 + signal.SIGPIPE
        assert child.stderr.read() == b""


@pytest.mark.parametrize(
    ("stream", "enabled", "after_s", "expected"),
    [
        (TerminalText, True, -1.0, "\rprompt: 10/20 tokens\rprompt: 20/20 tokens\r\x1b[K"),
        (TerminalText, False, -1.0, ""),
        (io.StringIO, True, -1.0, ""),
        (TerminalText, True, 0.5, ""),  # a short prompt
    ],
)
def test_progress_of_long_prompts_is_for_terminals(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], enabled: bool, after_s: float, expected: str
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr("llmcad_mlx.cli.generate._SHOW_AFTER_S", after_s)
    with closing(PromptProgress(enabled)) as on_progress:
        on_progress(10, 20)
        on_progress(20, 20)
    assert shown.getvalue() == expected
