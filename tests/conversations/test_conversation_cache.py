"""Kept caches, in memory or in a file: the same text as without, and nothing foreign or broken is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from llmcad_mlx import Engine, Result, UsageError, load
from llmcad_mlx.conversations.file import DIGEST, read_conversation
from llmcad_mlx.conversations.snapshot import DRAFT, TARGET
from llmcad_mlx.cpu import cpu_kernels_wanted
from llmcad_mlx.files import DiskError
from llmcad_mlx.files.safetensors import SafetensorsWriter, TensorSpec, dtype_name
from llmcad_mlx.models.cache import LazyKVCache
from tests.support.architecture_configs import WINDOW
from tests.support.tiny_folder import change_config, copy_folder, family_folder, make_folder

FIRST = {"role": "user", "content": "tell me of the cat in the hat and then of the other one"}
SECOND = {"role": "user", "content": "and then"}
OPTIONS = {"max_tokens": 16, "tree_nodes": 8}
WARM = {"temperature": 0.9, "seed": 5}
DATA = {"messages": [FIRST], "note": "é😀"}


pytestmark = pytest.mark.usefixtures("tiny_home")
Change = Callable[[dict[str, Any], dict[str, Any]], object]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same config and sizes, other weights."""
    return make_folder(tmp_path_factory.mktemp("models") / "other", seed=1)


def first_turn(engine: Engine, **options: Any) -> list[dict[str, str]]:
    """Answer the first message; returns the conversation with the second one."""
    answer = engine.generate([FIRST], **OPTIONS, **options).text
    return [FIRST, {"role": "assistant", "content": answer}, SECOND]


def second_turn(engine: Engine, messages: list[dict[str, str]], **options: Any) -> Result:
    return engine.generate(messages, **OPTIONS, **options)


@pytest.fixture(scope="module")
def saved(folder: Path, draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversation after its first turn."""
    path = tmp_path_factory.mktemp("conversations") / "saved.chat"
    with load(folder, draft) as engine:
        first_turn(engine)
        engine.save_conversation(path, DATA)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[list[dict[str, str]], list[int]]:
    """The conversation before its second turn, and what plain decoding answers."""
    with load(folder, None) as engine:
        messages = first_turn(engine, policy="throughput")
        engine.restore(None)
        result = second_turn(engine, messages)
        assert result.stats.reused_tokens == 0
        return messages, result.tokens


# --- The same text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "host"])
def test_a_loaded_conversation_goes_on_as_it_would_have(
    tmp_path: Path, folder: Path, draft: Path, family: str, options: dict[str, Any]
) -> None:
    """Sliding windows included: the prompt is longer than they are."""
    pair: tuple[Path, str | Path] = (folder, draft)
    if family != "host":
        target = family_folder(tmp_path / "target", family)
        pair = (target, copy_folder(target, tmp_path / "draft"))
    file = tmp_path / "a.chat"
    with load(*pair) as engine:
        messages = first_turn(engine, **options)
        size = engine.save_conversation(file, DATA)
        went_on = second_turn(engine, messages, policy="paper", **options)
        cache = engine.pair.target.cache
        assert isinstance(cache, LazyKVCache)
        assert family == "host" or any(store.window == WINDOW for store in cache.stores)
    assert size == file.stat().st_size
    assert went_on.stats.reused_tokens > 2 * WINDOW
    with load(*pair) as engine:
        stored = read_conversation(file)
        assert stored.data == DATA
        assert engine.restore_conversation(stored) == []
        assert stored.cache is not None
        (drafter,) = (drafter for drafter in engine.pair.drafters if drafter.cache is not None)
        assert drafter.num_cached == stored.cache["lengths"][DRAFT] > 2 * WINDOW
        assert engine.pair.target.cache.length == stored.cache["lengths"][TARGET] == len(stored.cache["tokens"])
        loaded = second_turn(engine, messages, policy="paper", **options)
        engine.restore(None)
        afresh = second_turn(engine, messages, policy="throughput", **options)
    assert loaded.tokens == went_on.tokens == afresh.tokens
    # A draft without its cache would still give the right text, only later.
    for name in ("reused_tokens", "target_passes", "drafted", "accepted"):
        assert getattr(loaded.stats, name) == getattr(went_on.stats, name), name
    assert afresh.stats.reused_tokens == 0


def test_a_snapshot_is_a_tight_copy(folder: Path, draft: Path) -> None:
    with load(folder, draft) as engine:
        assert engine.snapshot() is None
        first_turn(engine)
        snapshot = engine.snapshot()
        assert snapshot is not None
        target, drafted = snapshot.parts
        assert len(snapshot.tokens) == target.length == engine.pair.target.cache.length
        token_bytes = 2 * 2 * 32 * 4  # layers, keys and values, head dimension, float32
        assert snapshot.nbytes == (target.length + drafted.length) * token_bytes
        before = [np.array(layer.keys) for layer in target.layers]
        engine.generate("something else entirely", **OPTIONS)
        assert all(np.array_equal(old, layer.keys) for old, layer in zip(before, target.layers, strict=True))


def test_a_snapshot_taken_while_a_generation_runs(folder: Path, draft: Path, expected: Any) -> None:
    """Between two rounds: it holds what was read so far."""
    messages, tokens = expected
    with load(folder, draft) as engine:
        running = engine.stream_generate([FIRST], **OPTIONS)
        next(running)
        snapshot = engine.snapshot()
        assert snapshot is not None
        engine.restore(snapshot)
        with pytest.raises(UsageError, match="ended when a newer one began"):
            list(running)
        result = second_turn(engine, messages)
        assert (result.tokens, result.stats.reused_tokens) == (tokens, len(snapshot.tokens))


def test_another_engines_snapshot_is_refused(folder: Path) -> None:
    with load(folder, None) as one, load(folder, None) as two:
        one.generate("the cat", max_tokens=2)
        with pytest.raises(UsageError, match="another engine's"):
            two.restore(one.snapshot())


def test_a_model_whose_state_cannot_be_copied_saves_what_was_said(tmp_path: Path) -> None:
    target = family_folder(tmp_path / "mamba", "mamba")
    with load(target, None) as engine:
        first_turn_text = engine.generate("the cat", max_tokens=4).text
        assert engine.snapshot() is None
        engine.save_conversation(tmp_path / "a.chat", DATA)
        stored = read_conversation(tmp_path / "a.chat")
        assert (stored.data, stored.cache) == (DATA, None)
        assert engine.restore_conversation(stored) == []
        assert engine.generate("the cat", max_tokens=4).text == first_turn_text


# --- What does not fit --------------------------------------------------------------------------------------


def rewrite(source: Path, path: Path, change: Change) -> Path:
    """A copy with a right checksum whose cache facts or tensors `change` has altered."""
    arrays, metadata = mx.load(str(source), format="safetensors", return_metadata=True)
    del arrays["sha256"], metadata["format"]
    facts = json.loads(metadata["cache"])
    change(facts, arrays)
    specs = [TensorSpec(name, dtype_name(array.dtype), array.shape) for name, array in arrays.items()]
    with SafetensorsWriter(path, [*specs, DIGEST], {**metadata, "cache": json.dumps(facts)}) as writer:
        for name, array in arrays.items():
            writer.write_bytes(name, 0, np.array(array).tobytes())
        end = writer.extents[DIGEST.name].offset
        writer.write_bytes(DIGEST.name, 0, hashlib.sha256(path.read_bytes()[:end]).digest())
    return path


def belongs(**changes: str) -> Change:
    return lambda facts, arrays: facts["belongs_to"].update(changes)


def each(edit: Callable[[Any], Any], *names: str) -> Change:
    """Edit the arrays called so, or all."""
    return lambda facts, arrays: arrays.update({name: edit(arrays[name]) for name in names or arrays})


FORGED: dict[str, tuple[Change, str]] = {
    "unchanged": (lambda facts, arrays: None, ""),
    "other version": (belongs(version="llmcad-mlx 0.0.1"), "it is from another version"),
    "other device": (belongs(device="Apple M9 (gpu), MLX"), "it is from another device"),
    "no owner": (lambda facts, arrays: facts.update(belongs_to=None), "it cannot be read (TypeError)"),
    "other values": (each(lambda a: a * 1.1, "target.1.values"), "the model computes other values"),
    "NaN": (each(lambda a: a * float("nan"), "target.0.keys"), "the model computes other values"),
    "other shape": (each(lambda a: a[:, :, :16], "target.1.keys"), "its layers have other shapes or types"),
    "other type": (each(lambda a: a.astype(mx.float16)), "its layers have other shapes or types"),
    "missing layer": (lambda facts, arrays: arrays.pop("target.1.keys"), "its layers are of another kind"),
    "more layers": (lambda facts, arrays: facts["on_host"].update(target=[True] * 3), "another number of layers"),
    "other kernels": (
        lambda facts, arrays: facts["on_host"].update(target=[not cpu_kernels_wanted()] * 2),
        "other shapes or types",
    ),
    "foreign token": (lambda facts, arrays: facts["tokens"].__setitem__(3, 10**6), "its tokens are not the"),
    "no token": (lambda facts, arrays: facts.update(tokens=[]), "its tokens are not the model's"),
    "fewer tokens": (lambda facts, arrays: facts["tokens"].pop(), "it is longer than the model's context"),
    "fewer rows": (each(lambda a: a[:, :-1]), "no layer holds the first tokens"),
    "fewer rows in one layer": (
        each(lambda a: a[:, :-1], "target.1.keys", "target.1.values"),
        "it cannot be read (ValueError)",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_cache_that_does_not_fit_is_not_used(
    tmp_path: Path, folder: Path, saved: Path, expected: Any, name: str
) -> None:
    messages, tokens = expected
    change, reason = FORGED[name]
    stored = read_conversation(rewrite(saved, tmp_path / "forged.chat", change))
    assert stored.data == DATA
    with load(folder, "ngram") as engine:
        lines = engine.restore_conversation(stored)
        targets = [line for line in lines if line.startswith("the saved cache is not used: ")]
        assert len(targets) == (reason != "")
        assert all(reason in line and "\n" not in line for line in targets)
        result = second_turn(engine, messages)
        assert result.tokens == tokens
        assert (result.stats.reused_tokens > 0) == (reason == "")


def test_another_models_cache_is_not_used(
    tmp_path: Path, folder: Path, other: Path, saved: Path, expected: Any
) -> None:
    """Where config and files' headers are the same, only the values tell."""
    messages, _ = expected
    changed = copy_folder(folder, tmp_path / "changed")
    change_config(changed, rope_theta=20000.0)
    for model, reason in ((other, "the model computes other values"), (changed, "it is from another model")):
        with load(model, None) as engine:
            afresh = second_turn(engine, messages).tokens
            (line,) = engine.restore_conversation(read_conversation(saved))
            assert reason in line
            assert second_turn(engine, messages).tokens == afresh


def test_a_streamed_target_takes_what_a_resident_one_saved_and_another_draft_reads_again(
    folder: Path, other: Path, saved: Path, expected: Any
) -> None:
    messages, tokens = expected
    with load(folder, other, memory="8GB", pinned=0) as engine:
        assert engine.pair.plan is not None
        assert engine.pair.plan.streamed_bytes > 0
        (line,) = engine.restore_conversation(read_conversation(saved))
        assert line.startswith("the draft's saved cache is not used: the model computes other values")
        (drafter,) = (drafter for drafter in engine.pair.drafters if drafter.cache is not None)
        assert drafter.num_cached == 0
        result = second_turn(engine, messages)
    assert (result.tokens, result.stats.reused_tokens > 0) == (tokens, True)


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([data[place] ^ 4]) + data[len(data) + place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [flipped(-40), flipped(-20000), flipped(-1), lambda data: data[:-10000]],
    ids=["last row", "middle", "checksum", "truncated"],
)
def test_a_damaged_file_still_says_what_was_said(
    tmp_path: Path, folder: Path, draft: Path, saved: Path, expected: Any, damage: Callable[[bytes], bytes]
) -> None:
    messages, tokens = expected
    (tmp_path / "damaged.chat").write_bytes(damage(saved.read_bytes()))
    stored = read_conversation(tmp_path / "damaged.chat")
    assert stored.data == DATA
    with load(folder, draft) as engine:
        (line,) = engine.restore_conversation(stored)
        assert "its checksum is wrong, the file is damaged" in line
        assert second_turn(engine, messages).tokens == tokens


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text",
        (10**17).to_bytes(8, "little"),
        (200).to_bytes(8, "little") + b'{"__metadata__":',
        b"\x02\0\0\0\0\0\0\0{}",
        (10**5).to_bytes(8, "little") + b"[" * 10**5,
        (50).to_bytes(8, "little") + b'{"__metadata__":{"llmcad_mlx":"conversation 99"}}'.ljust(50),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    message = "another format" if b"conversation 99" in content else "is not a saved conversation"
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_conversation(tmp_path / "file")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"nothing\.chat: cannot be read: No such file"):
        read_conversation(tmp_path / "nothing.chat")


# --- Whole or not at all ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"]
)
def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    file = tmp_path / "a.chat"
    with load(folder, None) as engine:
        first_turn(engine)
        engine.save_conversation(file, DATA)
        before = file.read_bytes()

        def fail(*_: Any) -> int:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(SafetensorsWriter, "write_bytes", fail)
            with pytest.raises(DiskError if isinstance(error, OSError) else KeyboardInterrupt):
                engine.save_conversation(file, {})
        assert [path.name for path in tmp_path.iterdir()] == ["a.chat"]
        assert file.read_bytes() == before
        engine.save_conversation(file, {"again": True})
    assert read_conversation(file).data == {"again": True}
    assert os.stat(file).st_mode & 0o777 == 0o600


def test_other_files_are_not_overwritten(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear all")
    with load(folder, None) as engine:
        with pytest.raises(UsageError, match=r"letter\.txt: exists and is not a saved conversation"):
            engine.save_conversation(tmp_path / "letter.txt", DATA)
        with pytest.raises(UsageError, match="there is no folder"):
            engine.save_conversation(tmp_path / "none" / "a.chat", DATA)
    assert (tmp_path / "letter.txt").read_text() == "dear all"
