"""Single files from the Hugging Face hub, through huggingface_hub, with its bars.

A hub that cannot be reached is found out by one short request first: left to itself huggingface_hub retries
for half a minute (23 s measured without DNS).
"""

from __future__ import annotations

import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.sources.disk import HOME_REMEDY, full_disk_error, is_full
from llmcad_mlx.sources.presets import FileSource
from llmcad_mlx.sources.progress import Progress

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
