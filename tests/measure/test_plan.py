"""`llmcad-mlx plan`: the plan that loading makes, a forecast from what was measured, and nothing made up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmcad_mlx import load
from llmcad_mlx.loader import plan_pair
from llmcad_mlx.settings import MemoryOptions
from llmcad_mlx.store.names import find_pair
from llmcad_mlx.store.presets import FileSource, get_preset
from llmcad_mlx.streaming.storage import BLOCK_BYTES
from tests.support.tiny_folder import copy_folder, family_folder, make_folder

PROMPT = "then the other one ran in and then the other one"
LAYERS = 6
MB = 10**6
KEYS = {
    "target", "draft", "device", "estimated", "emulated",
    "budget_bytes", "total_bytes", "pinned_bytes", "streamed_bytes",
    "context", "max_nodes", "prefill_chunk", "num_buffers", "parts", "num_layers", "pinned_layers", "pin_head",
    "pin_embedding", "read_rate", "measured", "tokens_per_s", "larger", "drafts",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("own_home", "streams_small_matrices")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "target", layers=LAYERS)


@pytest.fixture(scope="module")
def draft(folder: Path) -> Path:
    return make_folder(folder.parent / "draft", layers=LAYERS, noise=0.02)


def cells(text: str, name: str) -> list[str]:
    """The row of a Markdown table that begins with `name`."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    (found,) = [row for row in rows if row[0] == name]
    return found[1:]


def test_it_is_the_plan_that_loading_makes(folder: Path, draft: Path, document: Any) -> None:
    where = {"pinned": "300kB", "context": 100}
    found = document("plan", "--target", folder, "--draft", draft, "--pinned", "300kB", "--context", 100)
    with load(folder, draft, **where) as engine:
        plan = engine.pair.plan
    assert set(found) == KEYS
    assert plan is not None
    assert plan.pinned_layers
    assert plan.streamed_bytes > 0
    assert found["pinned_layers"] == list(plan.pinned_layers)
    for name in ("pinned_bytes", "streamed_bytes", "context", "max_nodes", "prefill_chunk", "num_buffers"):
        assert found[name] == getattr(plan, name), name
    assert sum(found["parts"].values()) == found["total_bytes"]
    assert found["parts"]["draft weights"] + found["parts"]["draft KV"] == plan.draft_bytes
    assert found["parts"]["target KV"] == plan.kv_bytes


def test_the_table_has_a_row_for_each_part(folder: Path, draft: Path, output: Any) -> None:
    where = ("--target", folder, "--draft", draft, "--memory", "2GB", "--pinned", 0, "--context", 64)
    out, err = output("plan", *where)
    assert err == ""
    parts_of_memory = (
        "interpreter and libraries", "draft weights", "draft KV", "target KV", "logits and activations",
        "stream buffers", "small weights", "pinned layers", "pinned head", "pinned embedding", "spare",
    )  # fmt: skip
    sizes = [float(cells(out, name)[1].removesuffix(" MB")) for name in parts_of_memory]
    assert cells(out, "total") == ["", "2000.0 MB"]
    assert sum(sizes) == pytest.approx(2000, abs=0.05 * len(sizes))
    assert cells(out, "pinned layers") == ["0 of 6", "0.0 MB"]
    assert cells(out, "target KV")[0] == "64 tokens"
    assert "not measured yet for this pair: run generate with the same options" in out
    for name in ("speculative, A / (max(W/B, C) + D)", "at most, A·B/W", "plain, 1 / max(W/B, C)"):
        assert cells(out, name) == ["not measured"]
    assert float(cells(out, "plain streamer at most, B/W")[0].replace(",", "")) > 0


def test_a_given_rate_is_used_and_marked(folder: Path, document: Any, output: Any) -> None:
    where = ("--target", folder, "--pinned", 0, "--read-bandwidth", "1MB/s")
    found = document("plan", *where)
    assert found["emulated"] is True
    assert found["read_rate"] == {"bytes_per_s": 1e6, "emulated": True, "sampled_bytes": 0, "from_disk": True}
    assert found["tokens_per_s"]["plain_bound"] == pytest.approx(1e6 / found["streamed_bytes"])
    assert found["tokens_per_s"]["speculative"] is None
    out = output("plan", *where)[0]
    assert "predicted speed (emulated)" in out
    assert "B = 1 MB/s, emulated" in out


def test_without_a_rate_streamed_weights_are_read(folder: Path, document: Any) -> None:
    found = document("plan", "--target", folder, "--pinned", 0)
    rate = found["read_rate"]
    assert found["emulated"] is rate["emulated"] is False
    blocks = 2 * (LAYERS + 1) * BLOCK_BYTES
    assert abs(rate["sampled_bytes"] - found["streamed_bytes"]) < blocks  # a tiny model is read whole
    assert rate["bytes_per_s"] > 0
    assert found["tokens_per_s"]["plain_bound"] == pytest.approx(rate["bytes_per_s"] / found["streamed_bytes"])


def test_without_a_budget_all_is_resident_and_nothing_is_read(folder: Path, document: Any, output: Any) -> None:
    found = document("plan", "--target", folder)
    assert (found["budget_bytes"], found["streamed_bytes"], found["read_rate"]) == (None, 0, None)
    assert found["pinned_layers"] == list(range(LAYERS))
    assert found["larger"] == []
    assert "Nothing is read while decoding." in output("plan", "--target", folder)[0]


def test_what_was_measured_makes_the_forecast(folder: Path, draft: Path, document: Any, output: Any) -> None:
    where = {"pinned": 0, "read_bandwidth": "20MB/s"}
    with load(folder, draft, **where) as engine:
        result = engine.generate(PROMPT, max_tokens=60)
        assert result.stats.tokens_per_pass > 1
    words = ("--target", folder, "--draft", draft, "--pinned", 0, "--read-bandwidth", "20MB/s")
    found = document("plan", *words)
    measured, speeds = found["measured"], found["tokens_per_s"]
    assert measured["streamed_bytes"] == found["streamed_bytes"]
    assert 1 < measured["tokens_per_pass"] < 60
    assert measured["nodes"] >= measured["tokens_per_pass"] - 1
    assert measured["draft_step_s"] > 0
    read_s = found["streamed_bytes"] / 20e6
    a = measured["tokens_per_pass"]
    assert speeds["speculative"] == pytest.approx(a / (max(read_s, measured["pass_s"]) + measured["rest_s"]))
    assert speeds["speculative_bound"] == pytest.approx(a / read_s)
    assert speeds["plain"] == pytest.approx(1 / max(read_s, measured["plain_pass_s"]))
    assert speeds["plain"] <= speeds["plain_bound"] == pytest.approx(1 / read_s)
    assert "measured with this plan" in output("plan", *words)[0]

    other = document("plan", *words[:4], "--pinned", "300kB", "--read-bandwidth", "40MB/s")["measured"]
    assert other is None  # another rate, under which nothing ran
    near = document("plan", *words[:4], "--pinned", "300kB", "--read-bandwidth", "20MB/s")
    assert near["streamed_bytes"] < measured["streamed_bytes"]
    assert near["measured"] is None  # the same rate, but other bytes
    assert near["tokens_per_s"]["plain"] is near["tokens_per_s"]["speculative"] is None
    assert near["tokens_per_s"]["plain_bound"] == pytest.approx(20e6 / near["streamed_bytes"])


@pytest.mark.parametrize("policy", ["throughput", "paper", "chain", "plain"])
def test_a_plan_has_no_figures_of_another_situation(folder: Path, draft: Path, policy: str, document: Any) -> None:
    """What ran in memory is said of plans that read nothing, whatever their budget, and of no others; and back."""
    words = ("--target", folder, "--draft", draft)
    streaming = (*words, "--pinned", 0, "--read-bandwidth", "20MB/s")
    with load(folder, draft) as engine:
        engine.generate(PROMPT, max_tokens=40, policy=policy)
    assert document("plan", *streaming)["measured"] is None
    for budget in ((), ("--memory", "3GB"), ("--memory", "4GB", "--read-bandwidth", "20MB/s")):
        found = document("plan", *words, *budget)
        assert found["streamed_bytes"] == 0
        assert found["measured"]["streamed_bytes"] is None
        assert (found["measured"]["tokens_per_pass"] > 1) == (policy != "plain")
        assert found["tokens_per_s"]["plain"] > 0


def test_another_model_in_the_same_folder_has_no_figures(folder: Path, tmp_path: Path, document: Any) -> None:
    target = copy_folder(folder, tmp_path / "model")
    with load(target, None) as engine:
        engine.generate(PROMPT, max_tokens=20)
    words = ("plan", target, "--draft", "none")
    assert document(*words)["measured"] is not None
    shutil.rmtree(target)
    make_folder(target, layers=LAYERS, noise=0.5)
    assert document(*words)["measured"] is None


def test_what_streamed_says_nothing_of_a_plan_that_reads_nothing(
    folder: Path, draft: Path, document: Any, output: Any
) -> None:
    with load(folder, draft, pinned=0, read_bandwidth="20MB/s") as engine:
        engine.generate(PROMPT, max_tokens=40)
    words = ("--target", folder, "--draft", draft, "--memory", "3GB")
    for rate in ((), ("--read-bandwidth", "20MB/s")):
        found = document("plan", *words, *rate)
        assert found["streamed_bytes"] == 0
        assert found["measured"] is None
        assert set(found["tokens_per_s"].values()) == {None}
    out = output("plan", *words)[0]
    assert cells(out, "plain, 1 / max(W/B, C)") == ["not measured"]
    assert cells(out, "plain streamer at most, B/W") == ["–"]  # nothing is read
    with load(folder, draft, memory="3GB") as engine:
        engine.generate(PROMPT, max_tokens=40)
    assert document("plan", *words)["measured"]["tokens_per_pass"] > 1
    streaming = document("plan", *words[:4], "--pinned", 0, "--read-bandwidth", "20MB/s")
    assert streaming["measured"]["streamed_bytes"] == streaming["streamed_bytes"]
    for row in streaming["larger"]:
        assert (row["tokens_per_s"]["plain"] is None) == (row["streamed_bytes"] != 0)


def test_more_memory_and_smaller_drafts(folder: Path, draft: Path, document: Any, output: Any) -> None:
    """Around the budget at which the target just streams, whatever the interpreter takes."""
    options = MemoryOptions(pinned=0, context=32, read_bandwidth=1e6)
    pair = plan_pair(find_pair(str(folder), str(draft), False), options)
    budget = pair.plan.total_bytes + 200 * MB
    words = ("--target", folder, "--draft", draft, "--memory", budget, "--pinned", 0, "--context", 32)
    found = document("plan", *words, "--read-bandwidth", "1MB/s")
    assert found["larger"][-1]["streamed_bytes"] == 0
    assert [row["name"] for row in found["larger"]] == ["+25 %"]
    assert found["larger"][0]["budget_bytes"] == budget * 125 // 100
    assert [row["name"] for row in found["drafts"]] == ["draft half as large", "no draft model"]
    assert found["drafts"][1]["tokens_per_s"]["speculative"] is None
    assert found["drafts"][1]["total_bytes"] < found["total_bytes"]
    out = output("plan", *words, "--read-bandwidth", "1MB/s")[0]
    assert "Larger budgets are spent as --pinned auto would." in out
    assert cells(out, "now")[0] == f"{budget / 1e6:.1f} MB"
    assert cells(out, "no draft model")[2] == f"{found['streamed_bytes'] / 1e6:.1f} MB"


def test_an_impossible_budget_is_refused_as_generate_refuses_it(folder: Path, output: Any) -> None:
    where = ["--target", folder, "--memory", "1MB"]
    for words in (["plan", *where], ["plan", *where, "--json"], ["generate", PROMPT, *where]):
        out, err = output(*words, code=2)
        assert out == ""
        assert err.startswith("error: memory: 1 MB is too little; the smallest that works is ")
        assert err.count("\n") == 1


SIZES = (
    "target KV",
    "draft KV",
    "draft weights",
    "stream buffers",
    "pinned layers",
    "pinned head",
    "small weights",
)


def without_weights(folder: Path, path: Path) -> Path:
    """The folder as it is before its weights are fetched: config.json alone."""
    path.mkdir()
    config = {**json.loads((folder / "config.json").read_text()), "torch_dtype": "float32"}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_config_says_the_same_context_as_the_model(tmp_path: Path, document: Any) -> None:
    """Here a window that mlx-lm does not heed limits it."""
    model = family_folder(tmp_path / "model", "starcoder2")
    alone = without_weights(model, tmp_path / "alone")
    plans = [document("plan", "--target", path, "--draft", "none", "--memory", "8GB") for path in (model, alone)]
    assert [plan["context"] for plan in plans] == [8, 8]


@pytest.mark.parametrize("missing", [("target",), ("draft",), ("target", "draft")])
@pytest.mark.parametrize("where", [(), ("--pinned", "300kB", "--context", 64, "--read-bandwidth", "20MB/s")])
def test_a_config_is_enough_for_sizes(
    folder: Path, draft: Path, tmp_path: Path, missing: tuple[str, ...], where: Any, document: Any, output: Any
) -> None:
    pair = {"target": folder, "draft": draft}
    whole = document("plan", *(word for name, path in pair.items() for word in (f"--{name}", path)), *where)
    pair |= {name: without_weights(pair[name], tmp_path / name) for name in missing}
    words = ("plan", *(word for name, path in pair.items() for word in (f"--{name}", path)), *where)
    found = document(*words)
    assert (whole["estimated"], found["estimated"]) == (False, True)
    assert {name: found["parts"][name] for name in SIZES} == pytest.approx(
        {name: whole["parts"][name] for name in SIZES}, rel=0.03
    )
    for name in ("streamed_bytes", "pinned_layers", "context", "max_nodes", "prefill_chunk"):
        assert found[name] == whole[name]
    assert found["measured"] is None
    assert found["tokens_per_s"]["speculative"] is found["tokens_per_s"]["plain"] is None
    if where:
        assert found["tokens_per_s"]["plain_bound"] == pytest.approx(20e6 / found["streamed_bytes"])
    out = output(*words)[0]
    assert "(estimated)" in out
    assert "estimated from config.json" in out
    assert cells(out, "plain, 1 / max(W/B, C)") == ["not measured"]


def test_a_rate_is_not_known_before_there_is_something_to_read(folder: Path, tmp_path: Path, output: Any) -> None:
    out = output("plan", without_weights(folder, tmp_path / "model"), "--pinned", 0)[0]
    assert "B is not measured: there are no weights to read yet; --read-bandwidth states a rate." in out
    assert cells(out, "plain streamer at most, B/W") == ["not measured"]


@pytest.mark.parametrize("target", ["smollm2-135m", "qwen2.5-coder-1.5b"])
def test_presets_are_planned_before_they_are_fetched(
    target: str, document: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmcad_mlx.store.names.fetch_file", pytest.fail)
    preset = get_preset(target)
    # So much that all is pinned beside what the other tests of this process have left.
    found = document("plan", target, "--memory", "8GB")
    assert found["estimated"] is True
    assert found["draft"] == preset.draft_name != target
    fetched = [source.num_bytes for source in (preset.target, preset.draft) if isinstance(source, FileSource)]
    weights = sum(found["parts"].get(name, 0) for name in ("small weights", "pinned layers", "pinned head"))
    weights += found["parts"].get("pinned embedding", 0) or found["parts"]["pinned embedding, also the head"]
    assert weights == pytest.approx(fetched[0], rel=0.15)
    if len(fetched) > 1:
        # 5 bits a weight, scales included; the file has 6.2 of them
        assert found["parts"]["draft weights"] == pytest.approx(fetched[1] * 5 / 6.2, rel=0.03)


def test_derived_drafts_are_planned_before_they_are_made(document: Any) -> None:
    def draft_bytes(name: str) -> int:
        size: int = document("plan", "qwen2.5-coder-1.5b", "--draft", name)["parts"]["draft weights"]
        return size

    name = "qwen2.5-coder-1.5b"
    whole, bits, trimmed = (draft_bytes(f"{prefix}{name}") for prefix in ("", "3bit:", "trimmed:8192:"))
    assert draft_bytes("self:3") > whole > bits > trimmed > draft_bytes(f"trimmed:8192:3bit:{name}") > 0
    assert draft_bytes("none") == draft_bytes("ngram") == 0


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "not valid JSON"), ({}, "no model_type"), ({"model_type": "no-such"}, "that mlx-lm knows"),
     ({"model_type": "llama"}, "that mlx-lm knows")],
)  # fmt: skip
def test_a_config_of_no_model_is_refused(tmp_path: Path, config: Any, said: str, output: Any) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    err = output("plan", tmp_path, code=1)[1]
    assert said in err
    assert err.count("\n") == 1
