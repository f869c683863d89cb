"""Repositories from the Hugging Face hub, into the hub's own cache, continued where a download was cut off.

huggingface_hub begins a file anew in every process since version 2. Large files are therefore fetched here, to the
place in the cache where huggingface_hub looks for them (`blobs/<sha256>`), and checked; it does the rest.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from filelock import FileLock
from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.file_download import DryRunFileInfo, http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.sources.disk import require_free_space
from llmcad_mlx.sources.hub import (
    ETAG_TIMEOUT_S,
    HubUnreachableError,
    NoBars,
    bars,
    hub_endpoint,
    hub_errors,
    require_hub,
)
from llmcad_mlx.sources.progress import Progress

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
