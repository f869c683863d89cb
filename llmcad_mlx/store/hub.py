"""Repositories from the Hugging Face hub, into the hub's own cache, continued where a download was cut off.

huggingface_hub begins a file anew in every process since version 2. Large files are therefore fetched here, to the
place in the cache where huggingface_hub looks for them (`blobs/<sha256>`), and checked; it does the rest.

Single files from the Hugging Face hub, through huggingface_hub, with its bars.

A hub that cannot be reached is found out by one short request first: left to itself huggingface_hub retries
for half a minute (23 s measured without DNS).
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
from huggingface_hub.file_download import DryRunFileInfo, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.files.atomic import HOME_REMEDY, full_disk_error, is_full, require_free_space
from llmcad_mlx.progress import Progress
from llmcad_mlx.store.presets import FileSource

PROBE_TIMEOUT_S = 5.0
ETAG_TIMEOUT_S = 10.0


class HubUnreachableError(DownloadError):
    """The hub does not answer, or the environment says to stay offline."""


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def require_hub() -> None:
    """Raise HubUnreachableError unless the hub answers within seconds. Any HTTP status is an answer."""
    if constants.HF_HUB_OFFLINE:
        raise HubUnreachableError("the hub may not be used: HF_HUB_OFFLINE is set")
    request = urllib.request.Request(hub_endpoint() + "/api/models?limit=1", method="HEAD")
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


def fetch_hub_file(source: FileSource, part: Path, progress: Progress) -> None:
    """Complete `part`, which may hold the beginning of the file, from the hub.

    huggingface_hub's own download starts anew in every process since version 2; its `http_get` can continue.

    Raises HubUnreachableError when the connection fails, DownloadError when the hub answers but does not
    give the file. What arrived stays in `part` for the next try.
    """
    require_hub()
    endpoint = hub_endpoint()
    with hub_errors(f"{source.repo}/{source.file}", HOME_REMEDY):
        url = hf_hub_url(source.repo, source.file, revision=source.revision, endpoint=endpoint)
        found = get_hf_file_metadata(url, timeout=ETAG_TIMEOUT_S, endpoint=endpoint)
        _check_announced(source, found.size, found.etag)
        with part.open("ab") as out:
            http_get(
                url,
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=source.num_bytes,
                displayed_filename=source.file,
                tqdm_class=bars(progress),
            )


def _check_announced(source: FileSource, num_bytes: int | None, etag: str | None) -> None:
    """Refuse another file before it is downloaded. The etag of a large file is its sha256."""
    is_sha256 = etag is not None and re.fullmatch("[0-9a-f]{64}", etag)
    if (num_bytes is not None and num_bytes != source.num_bytes) or (is_sha256 and etag != source.sha256):
        raise DownloadError(
            f"{source.repo}/{source.file}: the hub has another file under this name "
            f"({num_bytes} bytes, sha256 {etag}; expected {source.num_bytes}, {source.sha256})"
        )


@contextmanager
def hub_errors(what: str, remedy: str) -> Iterator[None]:
    """Turn huggingface_hub's many exceptions into one line each; `remedy` is for a full disk."""
    try:
        yield
    except errors.GatedRepoError:
        raise DownloadError(f"{what}: ask for access on the repository's page, then run `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(
            f"{what}: the hub has no such repository, or it is private; check the name or run `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{what}: the hub has no such revision; check it on the repository's page") from None
    except errors.RemoteEntryNotFoundError:
        raise DownloadError(f"{what}: the repository has no such file") from None
    except errors.HFValidationError as error:
        raise DownloadError(f"{what}: not a repository name ({_first_line(error)})") from None
    except errors.HfHubHTTPError as error:
        raise _refused(what, error) from None
    except errors.LocalEntryNotFoundError as error:
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _refused(what, error.__cause__) from None
        raise _unreachable(error.__cause__ or error) from None
    except OSError as error:
        if is_full(error):
            raise full_disk_error(error, what, remedy) from None
        raise DownloadError(f"{what}: {_first_line(error)}; run the command again to continue") from None
    except Exception as error:
        # Transport errors come from httpx or httpx2, whichever this huggingface_hub uses.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _unreachable(error) from None


def _refused(what: str, error: errors.HfHubHTTPError) -> DownloadError:
    status = error.response.status_code
    if status in (401, 403):
        return DownloadError(
            f"{what}: the hub refuses access (status {status}); check the name or run `hf auth login`"
        )
    return DownloadError(f"{what}: the hub answered with status {status}; try again later")


def _unreachable(error: object) -> HubUnreachableError:
    return HubUnreachableError(f"{hub_endpoint()} cannot be reached ({_first_line(error)})")


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class NoBars(hub_tqdm):
    """huggingface_hub's bars, never drawn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]


def bars(progress: Progress) -> type[hub_tqdm] | None:
    """What to give huggingface_hub as `tqdm_class`: None draws its own bars."""
    return None if progress.bars else NoBars


RESUMABLE_BYTES = 16 << 20
"""Smaller files are fetched anew."""

# Weights, configuration and tokenizer of an mlx-lm model; no Python code, which is never run.
MODEL_FILES = (
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)

_REMEDY = "make room or set HF_HOME to another disk"
_HASH_BYTES = 4 << 20


def fetch_hub_repo(repo: str, revision: str | None, progress: Progress) -> Path:
    """The mlx-lm model in a hub repository, from the hub's cache where it is complete there.

    Raises DownloadError when it cannot be had, DiskError before the download when there is no room for it.
    """
    online = True
    try:
        require_hub()
    except HubUnreachableError as unreachable:
        online, reason = False, unreachable
    try:
        with hub_errors(repo, _REMEDY):
            if online:
                _fetch_large_files(repo, _missing(repo, revision), progress)
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=list(MODEL_FILES),
                    etag_timeout=ETAG_TIMEOUT_S,
                    endpoint=hub_endpoint(),
                    local_files_only=not online,
                    tqdm_class=bars(progress),
                )
            )
    except HubUnreachableError as error:
        if online:
            raise
        raise DownloadError(f"{repo}: not in the local cache, and {reason}") from error


def _missing(repo: str, revision: str | None) -> list[DryRunFileInfo]:
    """Files that are not in the cache."""
    try:
        files = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(MODEL_FILES),
            etag_timeout=ETAG_TIMEOUT_S,
            endpoint=hub_endpoint(),
            tqdm_class=NoBars,
            dry_run=True,
        )
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
    endpoint = hub_endpoint()
    url = hf_hub_url(repo, file.filename, revision=file.commit_hash, endpoint=endpoint)
    found = get_hf_file_metadata(url, timeout=ETAG_TIMEOUT_S, endpoint=endpoint)
    if found.size is None or found.etag is None or not re.fullmatch("[0-9a-f]{64}", found.etag):
        return
    blob, part = blobs / found.etag, blobs / f"{found.etag}.part"
    blobs.mkdir(parents=True, exist_ok=True)
    with FileLock(blobs / f"{found.etag}.lock"):
        if blob.exists():
            return
        with part.open("ab") as out:
            if out.tell() > found.size:
                out.seek(out.truncate(0))
            http_get(
                url,
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(),
                expected_size=found.size,
                displayed_filename=file.filename,
                tqdm_class=bars(progress),
            )
        _check(part, f"{repo}/{file.filename}", found.etag, progress)
        os.replace(part, blob)


def _check(part: Path, what: str, sha256: str, progress: Progress) -> None:
    digest = hashlib.sha256()
    with part.open("rb") as stream, progress.stage(f"checking {what}", part.stat().st_size) as advance:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
            advance(len(block))
    if digest.hexdigest() != sha256:
        part.unlink()
        raise DownloadError(f"{what}: sha256 is {digest.hexdigest()}, expected {sha256}; the file was removed")
