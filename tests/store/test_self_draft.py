"""`--draft self:4`: the target's own copy in fewer bits, made once, and the text it leaves alone."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model, load_model

from llmcad_mlx import files as disk
from llmcad_mlx import load
from llmcad_mlx.cli.main import run
from llmcad_mlx.cpu import prepare_for_device
from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files.bundle import verify_bundle
from llmcad_mlx.store import home_folder
from llmcad_mlx.store.convert import convert_folder
from llmcad_mlx.store.copies import DerivedDraft
from llmcad_mlx.store.names import find_pair
from tests.support.tiny_folder import EOS, change_config, copy_folder, make_folder

pytestmark = pytest.mark.usefixtures("own_home")

PROMPT = [5, 9, 30, 31, 12]
NUM_TOKENS = 60
NO_END: dict[str, Any] = {"logit_bias": {EOS: -100.0}}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target")


def self_draft(source: Path, bits: int) -> Path:
    return DerivedDraft(None, bits).make(source)


def weights(folder: Path) -> dict[str, mx.array]:
    """All weights at full precision."""
    model, _ = load_model(folder)
    return dict(tree_flatten(dequantize_model(model).parameters()))


def copies() -> list[str]:
    return sorted(file.name for file in (home_folder() / "self-drafts").glob("[!.]*"))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_text_is_the_plain_text(target: Path, bits: int) -> None:
    with load(target, draft="none") as plain, load(target, draft=f"self:{bits}") as speculating:
        for seed, temperature in enumerate((0.0, 0.8)):
            options: dict[str, Any] = {
                "max_tokens": NUM_TOKENS,
                "temperature": temperature,
                "seed": seed,
                **NO_END,
            }
            expected = plain.generate(PROMPT, **options)
            found = speculating.generate(PROMPT, policy="chain", tree_nodes=4, **options)
            assert found.tokens == expected.tokens
            assert found.stats.drafted > 0


def test_four_bits_are_right_more_often_than_other_drafts(target: Path, tmp_path: Path) -> None:
    """Also where the weights are random and every choice is a close one."""
    stranger = make_folder(tmp_path / "stranger", seed=7)
    rates = {}
    for draft in ("self:4", "ngram", str(stranger)):
        with load(target, draft=draft) as engine:
            result = engine.generate(PROMPT, max_tokens=NUM_TOKENS, policy="chain", tree_nodes=4, **NO_END)
            rates[draft] = result.stats.acceptance_rate
    assert rates["self:4"] > 0.3
    assert rates["self:4"] > 2 * max(rates["ngram"], rates[str(stranger)])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_copy_is_the_target_rounded(target: Path, bits: int) -> None:
    copy = self_draft(target, bits)
    config = json.loads((copy / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    assert verify_bundle(copy) is not None
    rounded = weights(copy)
    for name, array in weights(target).items():
        expected = array
        if array.ndim == 2:
            packed = mx.quantize(array, 32, bits)
            expected = mx.dequantize(*packed, 32, bits)
        assert mx.array_equal(rounded[name], expected), name


@pytest.mark.parametrize("bits", [2, 3])
def test_bits_without_host_kernels_compute_what_their_weights_say(target: Path, bits: int) -> None:
    """The model of the copy, prepared as the loader does it, against its own weights at full precision."""
    copy = self_draft(target, bits)
    model, _ = load_model(copy)
    prepare_for_device(model)
    full, _ = load_model(copy)
    full = dequantize_model(full)
    tokens = mx.array([PROMPT])
    assert mx.allclose(model(tokens), full(tokens), rtol=1e-3, atol=1e-3)


def test_a_quantised_target_is_rounded_again(target: Path, tmp_path: Path) -> None:
    """Scales of 8 and of 4 bits have the same shape: they must not be taken over."""
    convert_folder(target, tmp_path / "eight", 8, 32)
    rounded = weights(self_draft(tmp_path / "eight", 4))
    for name, array in weights(tmp_path / "eight").items():
        if array.ndim == 2:
            expected = mx.dequantize(*mx.quantize(array, 32, 4), 32, 4)
            assert mx.array_equal(rounded[name], expected), name
        else:
            assert mx.array_equal(rounded[name], array), name


def test_the_copy_is_made_once_for_each_state_of_the_target(target: Path, tmp_path: Path) -> None:
    folder = copy_folder(target, tmp_path / "target")
    first = find_pair(str(folder), "self:4", False)
    assert first.draft_path is not None
    written = first.draft_path.stat().st_mtime_ns
    assert find_pair(str(folder), "self:4", False) == first
    assert first.draft_path.stat().st_mtime_ns == written
    other = self_draft(folder, 2)
    os.utime(folder / "model.safetensors", ns=(1, 1))  # other weights
    second = self_draft(folder, 4)
    assert second != first.draft_path
    assert copies() == sorted([second.name, other.name])


def test_nothing_is_left_of_a_copy_that_could_not_be_finished(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(disk, "RESERVE_BYTES", 1 << 60)
        with pytest.raises(disk.DiskError, match="are needed for the model"):
            self_draft(target, 4)
    assert copies() == []
    assert self_draft(target, 4).exists()


@pytest.mark.parametrize("draft", ["self:5", "self:8", "self:", "self:four", "self:04", "self:4 "])
def test_other_bits_are_refused_before_the_target_is_looked_for(draft: str) -> None:
    with pytest.raises(UsageError, match=r"draft: 'self:.*' is not one of self:2, self:3, self:4"):
        find_pair("/nowhere", draft, False)


@pytest.mark.parametrize(("bits", "remedy"), [(4, "fewer bits or another draft"), (3, "another draft")])
def test_a_target_of_no_more_bits_is_refused(target: Path, tmp_path: Path, bits: int, remedy: str) -> None:
    folder = self_draft(target, bits)
    with pytest.raises(
        UsageError, match=rf"draft: self:{bits} needs a model of more bits, .* has {bits}; .*{remedy}"
    ):
        self_draft(folder, bits)
    assert self_draft(folder, 2).exists()


def test_a_target_without_rows_for_groups_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "narrow", hidden=40)
    with pytest.raises(ModelError, match="no weights divide into groups of 32; choose another draft"):
        self_draft(folder, 4)


def test_a_damaged_target_is_named(target: Path, tmp_path: Path) -> None:
    folder = copy_folder(target, tmp_path / "damaged")
    change_config(folder, model_type=None)
    with pytest.raises(ModelError, match=r"damaged/config\.json: no model_type"):
        self_draft(folder, 4)


def test_on_the_command_line(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "hi", "--target", str(target), "--max-tokens", "8", "--json"]
    texts = []
    for draft in ("none", "self:4"):
        assert run([*words, "--draft", draft]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert run([*words, "--draft", "self:9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_under_a_memory_budget(target: Path) -> None:
    with load(target, draft="none") as plain, load(target, draft="self:4", pinned=0) as streaming:
        expected = plain.generate(PROMPT, max_tokens=NUM_TOKENS, **NO_END)
        found = streaming.generate(PROMPT, max_tokens=NUM_TOKENS, **NO_END)
    assert found.tokens == expected.tokens


@pytest.mark.parametrize("stored", ["float32", "8 bits"])
def test_the_copy_is_made_tensor_by_tensor(tmp_path: Path, stored: str) -> None:
    folder = make_folder(tmp_path / "deep", layers=12, hidden=256)
    if stored == "8 bits":
        convert_folder(folder, tmp_path / "eight", 8, 32)
        folder = tmp_path / "eight"
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    self_draft(folder, 4)
    all_weights, largest = 12 * 2.2e6, 512 * 256 * 4
    assert mx.get_peak_memory() - before < 6 * largest < 0.2 * all_weights
