"""Files and repositories from the Hugging Face hub, through huggingface_hub, with its bars.

huggingface_hub begins a file anew in every process since version 2, though its `http_get` can continue one. So
large files are fetched here, those of a repository to the place in the cache where huggingface_hub looks for
them (`blobs/<sha256>`), and checked; it does the rest. A hub that cannot be reached is found out by one short
request first: left to itself huggingface_hub retries for half a minute (23 s measured without DNS).
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.file_download import DryRunFileInfo, HfFileMetadata, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.files.atomic import HOME_REMEDY, full_disk_error, is_full, require_free_space
from llmcad_mlx.progress import Progress
from llmcad_mlx.store.presets import FileSource

PROBE_TIMEOUT_S = 5.0
ETAG_TIMEOUT_S = 10.0
RESUMABLE_BYTES = 16 << 20
"""Smaller files of a repository are fetched anew."""

# Weights, configuration and tokenizer of an mlx-lm model; no Python code, which is never run.
_MODEL_FILES = (
    "*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl",
    "*.jinja",
)  # fmt: skip
_REMEDY = "make room or set HF_HOME to another disk"
_HASH_BYTES = 4 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


_REASONS = {
    errors.GatedRepoError: "ask for access on the repository's page, then run `hf auth login`",
    errors.RepositoryNotFoundError: "the hub has no such repository, or it is private; "
    "check the name or run `hf auth login`",
    errors.RevisionNotFoundError: "the hub has no such revision; check it on the repository's page",
    errors.RemoteEntryNotFoundError: "the repository has no such file",
}


class HubUnreachableError(DownloadError):
    """The hub does not answer, or the environment says to stay offline."""


def fetch_hub_file(source: FileSource, part: Path, progress: Progress) -> None:
    """Complete `part`, which may hold the beginning of the file, from the hub. The caller checks the sha256.

    Raises HubUnreachableError when the connection fails, DownloadError when the hub answers but does not
    give the file. What arrived stays in `part` for the next try.
    """
    _require_hub()
    with _hub_errors(f"{source.repo}/{source.file}", HOME_REMEDY):
        url, found = _look_up(source.repo, source.file, source.revision)
        etag = found.etag or ""
        if found.size not in (None, source.num_bytes) or (_SHA256.fullmatch(etag) and etag != source.sha256):
            raise DownloadError(
                f"{source.repo}/{source.file}: the hub has another file under this name "
                f"({found.size} bytes, sha256 {found.etag}; expected {source.num_bytes}, {source.sha256})"
            )
        _complete(url, part, source.num_bytes, source.file, progress)


def fetch_hub_repo(repo: str, revision: str | None, progress: Progress) -> Path:
    """The mlx-lm model in a hub repository, from the hub's cache where it is complete there.

    Raises DownloadError when it cannot be had, DiskError before the download when there is no room for it.
    """
    try:
        _require_hub()
    except HubUnreachableError as unreachable:
        try:
            with _hub_errors(repo, _REMEDY):
                return Path(_snapshot(repo, revision, local_files_only=True, tqdm_class=_bars(progress)))
        except HubUnreachableError as error:
            raise DownloadError(f"{repo}: not in the local cache, and {unreachable}") from error
    with _hub_errors(repo, _REMEDY):
        _fetch_large_files(repo, _missing(repo, revision), progress)
        return Path(_snapshot(repo, revision, tqdm_class=_bars(progress)))


def check_sha256(part: Path, what: str, sha256: str, progress: Progress) -> None:
    """Remove `part` and raise DownloadError, beginning with `what`, unless it is the file with this checksum."""
    digest = hashlib.sha256()
    with part.open("rb") as stream, progress.stage(f"checking {what}", part.stat().st_size) as advance:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != sha256:
        part.unlink()
        raise DownloadError(f"{what}: sha256 is {digest.hexdigest()}, expected {sha256}; the file was removed")


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _require_hub() -> None:
    """Raise HubUnreachableError unless the hub answers within seconds. Any HTTP status is an answer."""
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("the hub may not be used: HF_HUB_OFFLINE is set")
    request = urllib.request.Request(_endpoint() + "/api/models?limit=1", method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        # A certificate this Python does not know still means that somebody answers; huggingface_hub brings
        # its own certificates.
        if not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _unreachable(error.reason) from None
    except (OSError, ValueError) as error:
        raise _unreachable(error) from None


def _look_up(repo: str, file: str, revision: str) -> tuple[str, HfFileMetadata]:
    """A file's address, and what the hub says of it; the etag of a large file is its sha256."""
    url = hf_hub_url(repo, file, revision=revision, endpoint=_endpoint())
    return url, get_hf_file_metadata(url, timeout=ETAG_TIMEOUT_S, endpoint=_endpoint())


def _complete(url: str, part: Path, num_bytes: int, name: str, progress: Progress) -> None:
    """Append what is missing to `part`; one that is too long is begun anew."""
    with part.open("ab") as out:
        if out.tell() > num_bytes:
            out.seek(out.truncate(0))
        http_get(
            url,
            out,
            resume_size=out.tell(),
            headers=build_hf_headers(),
            expected_size=num_bytes,
            displayed_filename=name,
            tqdm_class=_bars(progress),
        )


def _snapshot(repo: str, revision: str | None, **options: Any) -> Any:
    """huggingface_hub's download of a model's files."""
    return snapshot_download(
        repo,
        revision=revision,
        allow_patterns=list(_MODEL_FILES),
        etag_timeout=ETAG_TIMEOUT_S,
        endpoint=_endpoint(),
        **options,
    )


def _missing(repo: str, revision: str | None) -> list[DryRunFileInfo]:
    """Files that are not in the cache."""
    try:
        files = _snapshot(repo, revision, dry_run=True, tqdm_class=_NoBars)
    except errors.DryRunError:
        return []  # the hub does not say; without `dry_run` the error has its reason
    return [file for file in files if file.will_download]


def _fetch_large_files(repo: str, missing: list[DryRunFileInfo], progress: Progress) -> None:
    cache = Path(constants.HF_HUB_CACHE).expanduser()
    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    num_bytes = sum(file.file_size or 0 for file in missing)
    arrived = sum(part.stat().st_size for part in blobs.glob("*.part"))
    cache.mkdir(parents=True, exist_ok=True)
    require_free_space(cache, max(0, num_bytes - arrived), repo, _REMEDY)
    for file in missing:
        if RESUMABLE_BYTES <= (file.file_size or 0) <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            _fetch_blob(repo, file, blobs, progress)


def _fetch_blob(repo: str, file: DryRunFileInfo, blobs: Path, progress: Progress) -> None:
    """Complete a file of the cache. Files without a sha256 are left to huggingface_hub."""
    url, found = _look_up(repo, file.filename, file.commit_hash)
    if found.size is None or found.etag is None or not _SHA256.fullmatch(found.etag):
        return
    blob, part = blobs / found.etag, blobs / f"{found.etag}.part"
    blobs.mkdir(parents=True, exist_ok=True)
    with FileLock(blobs / f"{found.etag}.lock"):
        if blob.exists():
            return
        _complete(url, part, found.size, file.filename, progress)
        check_sha256(part, f"{repo}/{file.filename}", found.etag, progress)
        os.replace(part, blob)


@contextmanager
def _hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn huggingface_hub's many exceptions into one line each; `remedy` is for a full disk."""
    try:
        yield
    except Exception as error:
        known = next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), None)
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
        if known is not None:
            raise DownloadError(f"{what}: {known}") from None
        if isinstance(cause, errors.HfHubHTTPError):
            raise DownloadError(f"{what}: {_refusal(cause.response.status_code)}") from None
        # Transport errors come from httpx or httpx2, whichever this huggingface_hub uses.
        if isinstance(error, errors.LocalEntryNotFoundError) or type(error).__module__.startswith("httpx"):
            raise _unreachable(cause or error) from None
        if isinstance(error, errors.HFValidationError):
            raise DownloadError(f"{what}: not a repository name ({_first_line(error)})") from None
        if not isinstance(error, OSError):
            raise
        if is_full(error):
            raise full_disk_error(error, what, remedy) from None
        raise DownloadError(f"{what}: {_first_line(error)}; run the command again to continue") from None


def _refusal(status: int) -> str:
    if status in (401, 403):
        return f"the hub refuses access (status {status}); check the name or run `hf auth login`"
    return f"the hub answered with status {status}; try again later"


def _unreachable(error: object) -> HubUnreachableError:
    return HubUnreachableError(f"{_endpoint()} cannot be reached ({_first_line(error)})")


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _NoBars(hub_tqdm):
    """huggingface_hub's bars, never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def _bars(progress: Progress) -> type[hub_tqdm] | None:
    """What to give huggingface_hub as `tqdm_class`: None draws its own bars."""
    return None if progress.bars else _NoBars
