"""Bad input: one clear line on stderr, the right exit code, no traceback, and nothing on stdout."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from llmcad_mlx import Engine, ModelError, UsageError, VocabularyError, load
from llmcad_mlx.settings import GenerationOptions
from tests.support.command_line import finished
from tests.support.tiny_folder import change_config, copy_folder, make_folder, poison

FAILED, USAGE = 1, 2
Refused = Callable[..., str]
POISONED_PROMPT = "\"#$%&'()"  # reads the row of the embeddings that `poison` spoils

pytestmark = pytest.mark.usefixtures("tiny_home")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "good", context=64)


@pytest.fixture(scope="module")
def engine(tiny_home: Path, good: Path) -> Iterator[Engine]:
    with load(good) as loaded:
        yield loaded


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_folder(good, tmp_path / "bad")


@pytest.fixture
def refused(output: Callable[..., tuple[str, str]]) -> Refused:
    """Run the command line; check that it failed as it should, and return its one line."""

    def check(code: int, *argv: object) -> str:
        out, err = output(*argv, code=code)
        assert (out, err.count("\n")) == ("", 1), err
        assert err.startswith("error: ")
        return err

    return check


# --- Models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"GIF89a" * 50), "not a safetensors file"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not valid JSON"),
        (lambda folder: change_config(folder, num_attention_heads="two"), "does not describe a 'llama' model"),
        (
            lambda folder: change_config(folder, model_file="evil.py"),
            "brings code of its own ('evil.py')",
        ),
    ],
    ids=["foreign weights", "binary JSON", "impossible config", "code of its own"],
)
def test_broken_model_folders(
    good: Path, bad: Path, refused: Refused, damage: Callable[[Path], object], message: str
) -> None:
    (bad / "evil.py").write_text("raise SystemExit('ran')")
    damage(bad)
    for words in (["--target", bad], ["--target", good, "--draft", bad]):
        line = refused(FAILED, "generate", "hi", *words)
        assert message in line
        assert str(bad) in line
    with pytest.raises(ModelError):
        load(bad)


def test_targets_that_are_no_folder(good: Path, tmp_path: Path, refused: Refused) -> None:
    for name, quoted in (("model.gguf", "model"), ("my [1] Größe.GGUF", "'my [1] Größe'")):
        gguf = tmp_path / name
        assert "no such file" in refused(FAILED, "generate", "hi", "--target", gguf)
        gguf.write_bytes(b"GGUF")
        for words in (
            ["generate", "hi", "--target"],
            ["chat"],
            ["serve"],
            ["generate", "hi", "--target", good, "--draft"],
        ):
            command = f"GGUF files must be converted first: llmcad-mlx convert {shlex.quote(str(gguf))} {quoted}\n"
            assert refused(FAILED, *words, gguf).endswith(command)
    file = good / "config.json"
    assert f"{file}: is a file" in refused(FAILED, "generate", "hi", "--target", file)
    for missing in (tmp_path / "nowhere", "nosuchpreset", ""):
        line = refused(FAILED, "generate", "hi", "--target", missing)
        assert f"'{missing}'" in line
        assert "smollm2-135m" in line


def test_a_draft_with_other_tokens(good: Path, bad: Path, refused: Refused) -> None:
    tokenizer = (bad / "tokenizer.json").read_text()
    assert '"%": 6' in tokenizer
    (bad / "tokenizer.json").write_text(tokenizer.replace('"%": 6', '"~~": 6'))
    line = refused(FAILED, "generate", "hi", "--target", good, "--draft", bad)
    assert "token 6 is '%' in the target and '~~' in the draft" in line
    with pytest.raises(VocabularyError, match="token 6 is"):
        load(good, bad)


@pytest.mark.parametrize("weight", ["lm_head.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("policy", ["plain", "throughput"])
def test_nan_logits(bad: Path, refused: Refused, weight: str, policy: str) -> None:
    poison(bad, weight)
    line = refused(FAILED, "generate", POISONED_PROMPT, "--target", bad, "--policy", policy)
    assert "logits contain NaN" in line


@pytest.mark.parametrize(
    ("weight", "words", "message"),
    [
        ("lm_head.weight", [], "cannot be used as a draft"),
        ("model.embed_tokens.weight", ["--policy", "paper"], "the draft's logits contain NaN"),  # later
        ("model.embed_tokens.weight", ["--policy", "chain"], "the draft's logits contain NaN"),
    ],
)
def test_a_draft_with_nan_logits(
    good: Path, bad: Path, refused: Refused, weight: str, words: list[str], message: str
) -> None:
    poison(bad, weight)
    pair = ["--target", good, "--draft", bad]
    assert message in refused(FAILED, "generate", POISONED_PROMPT, *pair, *words)


# --- Prompts ------------------------------------------------------------------------------------------------


def test_prompts_that_cannot_be_read(good: Path, tmp_path: Path, refused: Refused) -> None:
    binary, blank = tmp_path / "binary", tmp_path / "blank"
    binary.write_bytes(b"\xff\xfe\xfd")
    blank.write_text(" \n")
    for words, message in (
        ([], "prompt: give it as an argument"),
        (["hi", "--prompt-file", blank], "prompt: give it as an argument"),
        ([""], "prompt: it is empty"),
        (["  \n "], "prompt: it is empty"),
        (["--prompt-file", blank], f"{blank}: it is empty"),
        (["--prompt-file", binary], f"{binary}: is not UTF-8 text"),
        (["--prompt-file", tmp_path], f"{tmp_path}: cannot be read"),
        (["caf\udce9"], "prompt: is not UTF-8 text"),
        (["hi", "--system", "caf\udce9"], "system: is not UTF-8 text"),
        (["hi", "--stop", "caf\udce9"], "stop: is not UTF-8 text"),
        (["hi", "--memory", "16"], "memory: 16 would be bytes; did you mean 16GB?"),
        (["hi", "--read-bandwidth", "250"], "read-bandwidth: 250 would be bytes; did you mean 250MB/s?"),
        (["--prompt-file", tmp_path / "nowhere"], "nowhere: cannot be read: No such file"),
        (["hi", "--raw", "--system", "be brief"], "a raw prompt takes no system message"),
    ):
        # No model is loaded for these: the target does not exist.
        assert message in refused(USAGE, "generate", *words, "--target", tmp_path / "nowhere")


def test_messages_for_a_model_without_template(tmp_path: Path, refused: Refused) -> None:
    folder = make_folder(tmp_path / "base", template=False)
    assert "no chat template" in refused(USAGE, "generate", "hi", "--system", "x", "--target", folder)
    with load(folder) as base, pytest.raises(UsageError, match="no chat template"):
        base.generate([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"), ([], "empty"), (None, "NoneType"), (7, "int"), (b"hi", "bytes"), ({"a": 1}, "dict"),
        ([1, "a"], "'a' is neither"), ([True], "True is neither"), ([1.5], "1.5 is neither"),
        ([-1], "token -1 is not in the vocabulary of 112"), ([112], "token 112 is not in the vocabulary"),
        ([1, {"role": "user", "content": "x"}], "neither a token id nor a message"),
        ([{"role": "user"}], "content: is missing"), ([{"content": "x"}], "role: give"),
        ([{"role": 3, "content": "x"}], "role: give"),
        ([{"role": "robot", "content": "x"}], "chat template refuses the messages: unknown role robot"),
    ],
)  # fmt: skip
def test_prompts_in_python(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^prompt: .*{message}"):
        engine.stream_generate(prompt)


# --- Options ------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE: dict[str, list[Any]] = {
    "max_tokens": [0, -2, 1.5, "5", None, True],
    "temperature": [-0.1, NAN, INF, "hot", None, True, 1e-9, 1e39, 10**40],
    "top_p": [0, -1, 1.01, NAN, None, False, "0.9"],
    "top_k": [-1, 1.5, "3", None, True],
    "min_p": [-0.1, 1.1, NAN, True],
    "seed": [-1, 2**64, 1.5, None, True],
    "repetition_penalty": [-1, NAN, "x", None, True],
    "presence_penalty": [INF, None],
    "frequency_penalty": [NAN, "x", False],
    "repetition_context_size": [0, -1, 2.5, True],
    "presence_context_size": [0],
    "frequency_context_size": [0, None],
    "logit_bias": [[1], {-1: 1.0}, {"a": 1.0}, {3: NAN}, {3: True}, {112: 1.0}],
    "logits_processors": [None, 5, ["x"], print],
    "policy": ["fastest", "", None, 3],
    "tree_nodes": [0, -1, 5000, 2.5, "8"],
    "pipeline": [1, None, "no"],
    "tree": [0, None],
    "fallback": [0, "yes"],
    "stop": ["", ["a", ""], 5, [5], {"a": 1}],
    "stop_tokens": [0, 5, [-1], "ab", ["a"], [True], [112], [2**31]],
}


@pytest.mark.parametrize(("option", "value"), [(name, v) for name, values in OUT_OF_RANGE.items() for v in values])
def test_options_out_of_range_in_python(engine: Engine, option: str, value: Any) -> None:
    """At the call, not at the first token."""
    with pytest.raises(ValueError, match=f"^{option}[ :]") as caught:
        engine.stream_generate("hi", **{option: value})
    assert "\n" not in str(caught.value)


def test_every_option_is_tested_for_its_range() -> None:
    assert set(OUT_OF_RANGE) == set(GenerationOptions().keywords())


def test_unknown_options_in_python(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"^temp: unknown option; the options are .*temperature"):
        engine.generate("hi", temp=0.5)
    with pytest.raises(UsageError, match=r"^tree_nodes: the plain policy has no tree"):
        engine.generate("hi", policy="plain", tree_nodes=4)
    for name, value in (("target", 5), ("draft", 5), ("draft", "")):
        with pytest.raises(UsageError, match=f"^{name}: "):
            load(**{"target": engine.pair.names.target_path, name: value})


UNREAD = ["generate", "hi", "--target", "/nowhere"]


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        # Refused before the target, which does not exist, is looked for.
        ([*UNREAD, "--temp", "nan"], USAGE, "temperature: must be a finite number"),
        ([*UNREAD, "--temp", "hot"], USAGE, "'--temp'"),
        ([*UNREAD, "--top-k", "1.5"], USAGE, "'--top-k'"),
        ([*UNREAD, "--policy", "plain", "--tree-nodes", "4"], USAGE, "tree_nodes: the plain policy has no tree"),
        ([*UNREAD, "--stop", ""], USAGE, "stop: "),
        ([*UNREAD, "--temp"], USAGE, "'--temp' requires an argument"),
        ([*UNREAD, "--json=maybe"], USAGE, "--json"),
        ([*UNREAD, "more"], USAGE, "more"),
        (["generate", "hi", "--draft", ""], USAGE, "draft: ''"),
        (["chat", "--target", "/nowhere", "--temp", "-1"], USAGE, "temperature: -1.0 is out of range"),
        (["chat", "--target", "/nowhere", "--load", "nothing.chat"], USAGE, "nothing.chat: cannot be read"),
        (["chatter"], USAGE, "No such command 'chatter'"),
        (["--nonsense"], USAGE, "No such option"),
        (["convert"], USAGE, "Missing argument"),
        (["convert", "/nowhere/x.gguf", "/nowhere/out"], FAILED, "/nowhere/x.gguf"),
        (["pull"], USAGE, "pull: name a preset"),
        (["pull", "nosuchpreset"], FAILED, "nosuchpreset: no such preset; there are smollm2-135m, qwen"),
    ],
)
def test_bad_usage(refused: Refused, argv: list[str], code: int, message: str) -> None:
    assert message in refused(code, *argv)


# --- Debugging, and a real process --------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_shows_the_traceback_wherever_it_stands(
    output: Callable[..., tuple[str, str]], tmp_path: Path, place: int
) -> None:
    argv = ["generate", "hi", "--target", str(tmp_path / "nowhere")]
    argv.insert(place, "--debug")
    err = output(*argv, code=FAILED)[1]
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" in output("--debug", "generate", "hi", "--temp", "-1", code=USAGE)[1]


NO_MEMORY = [
    MemoryError(),
    RuntimeError(
        "[METAL] Command buffer execution failed: Insufficient Memory "
        "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
    ),
    RuntimeError("[malloc] Unable to allocate 8589934592 bytes."),
    RuntimeError("[metal::malloc] Attempting … which is greater than the maximum allowed buffer size of 8 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["host", "Metal", "allocator", "buffer"])
def test_too_little_memory_is_one_line_too(
    good: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(Engine, "stream_generate", Mock(side_effect=error))
    message = "error: there is not enough memory; give a smaller --memory or --context, or a smaller model"
    assert refused(FAILED, "generate", "hi", "--target", good).startswith(message)


def test_in_a_process_of_its_own(good: Path) -> None:
    done = finished("generate", "x" * 99, "--target", good)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "context of 64" in done.stderr
