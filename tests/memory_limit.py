"""Does a model larger than its budget really run in it? Asked of the kernel: a memory cgroup of that size, from
the start of the process to its end.

python tests/memory_limit.py [--qwen] [--inflated] [--mlx-lm] [--smallest [FOLDER …]]

Without options the first three:

- `--qwen`: the pair qwen2.5-coder-1.5b (target 1.1 GB, draft 0.4 GB) at 1 GB;
- `--inflated`: the embedded target with added layers that change nothing, 2 GB, at 600 MB;
- `--mlx-lm`: mlx-lm alone on the Qwen target at 1 GB, which the kernel kills;
- `--smallest`: the embedded model, the pair, the inflated model and model folders, each in the smallest budget
  that a refusal names, with kernels that were compiled before and with none.

Each answer must be that of a run without a limit, and the process's own peak must not exceed the budget. Exit code
1 if something is wrong; where no memory cgroup can be made, it says so and ends with 0. Needs root, or a session
in which `systemd-run --user --scope` may delegate the memory controller.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QWEN = "qwen2.5-coder-1.5b"
MB = 10**6
PROMPT = "Write a Python function that merges two sorted lists."
CGROUPS, V1 = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
LIMIT, SWAP, PEAK = (
    ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes")
    if V1.is_dir()
    else ("memory.max", "memory.swap.max", "memory.peak")
)
KILLED = -9

GENERATE = (sys.executable, "-c", "from llmcad_mlx.cli.main import main; main()", "generate", PROMPT, "--json")
MLX_LM = """
import sys
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
for response in stream_generate(model, tokenizer, "Hello", max_tokens=1):
    print(response.text)
"""


class NoCgroupError(Exception):
    """This machine lets nobody, or not us, limit memory."""


@contextmanager
def limited_group(limit: int) -> Iterator[Path]:
    """A new memory cgroup of `limit` bytes without swap. Raises NoCgroupError."""
    version_2 = not V1.is_dir()
    group = (_own_group() if version_2 else V1) / f"llmcad-mlx-{os.getpid()}-{limit}"
    try:
        if version_2:
            (group.parent / "cgroup.subtree_control").write_text("+memory")
        group.mkdir()
    except OSError as error:
        raise NoCgroupError(f"{group.parent}: {error.strerror}") from None
    try:
        try:
            (group / LIMIT).write_text(str(limit))
            if (group / SWAP).exists():
                (group / SWAP).write_text("0" if version_2 else str(limit))
        except OSError as error:
            raise NoCgroupError(f"{group}: {error.strerror}") from None
        yield group
    finally:
        group.rmdir()


def _own_group() -> Path:
    line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return CGROUPS / line[3:].lstrip("/")


def run(command: Sequence[str], group: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run to the end, in `group` if given."""

    def join() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(command, capture_output=True, text=True, preexec_fn=join, cwd=ROOT)


def peak_of_group(group: Path) -> int | None:
    """The kernel's own figure, page cache included."""
    return int((group / PEAK).read_text()) if (group / PEAK).exists() else None


def answer(arguments: Sequence[str], group: Path | None = None) -> dict[str, Any]:
    """The JSON report of `llmcad-mlx generate`."""
    done = run([*GENERATE, *arguments], group)
    if done.returncode != 0:
        how = "was killed by the kernel" if done.returncode == KILLED else f"ended with {done.returncode}"
        raise SystemExit(f"generate {' '.join(arguments)} {how}: {done.stderr.strip()[-500:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check_pair(name: str, arguments: Sequence[str], budget: int) -> bool:
    """Under the limit the answer is that of an unlimited run, and the peak stays below the budget."""
    with limited_group(budget) as group:
        limited = answer([*arguments, "--memory", f"{budget // MB}MB"], group)
        kernel_peak = peak_of_group(group)
    free = answer(arguments)
    same = limited["tokens"] == free["tokens"]
    fits = limited["peak_rss_bytes"] <= limited["budget_bytes"] == budget
    print(
        f"{name}: budget {budget / MB:.0f} MB, peak {limited['peak_rss_bytes'] / MB:.0f} MB "
        f"(kernel, page cache included: {'unknown' if kernel_peak is None else f'{kernel_peak / MB:.0f} MB'}; "
        f"without a limit: {free['peak_rss_bytes'] / MB:.0f} MB); "
        f"pinned {limited['pinned_bytes'] / MB:.0f} MB, {limited['target_passes']} passes, "
        f"{limited['streamed_bytes'] / MB:.0f} MB streamed, {limited['tokens_per_s']:.2f} tokens/s; "
        f"{len(limited['tokens'])} tokens {'as without a limit' if same else 'DIFFER from those without a limit'}"
        f"{'' if fits else '; PEAK ABOVE BUDGET'}",
        flush=True,
    )
    return same and fits


def smallest_budget(arguments: Sequence[str]) -> int:
    """The one that a refusal names."""
    done = run([*GENERATE, *arguments, "--memory", "20MB"])
    found = re.search(r"the smallest that works is (\d+) MB", done.stderr)
    if found is None:
        raise SystemExit(f"generate {' '.join(arguments)} --memory 20MB: {done.stderr.strip()[-300:]}")
    return int(found[1]) * MB


def check_smallest(name: str, arguments: Sequence[str]) -> bool:
    """It works in the smallest budget, and in a first run too, for which all kernels are compiled."""
    budget = smallest_budget(arguments)
    good = check_pair(f"{name}, smallest", arguments, budget)
    with tempfile.TemporaryDirectory() as empty:
        os.environ["NUMBA_CACHE_DIR"] = empty
        try:
            return check_pair(f"{name}, first run", arguments, budget) and good
        finally:
            del os.environ["NUMBA_CACHE_DIR"]


def check_mlx_lm(budget: int) -> bool:
    """mlx-lm on the target alone is killed."""
    folder = _folder(QWEN)
    with limited_group(budget) as group:
        done = run([sys.executable, "-c", MLX_LM, folder], group)
    killed = done.returncode == KILLED
    print(
        f"mlx-lm on the target alone: limit {budget / MB:.0f} MB: "
        + (
            "killed by the kernel" if killed else f"NOT KILLED, ended with {done.returncode}: {done.stderr[-300:]}"
        ),
        flush=True,
    )
    return killed


def _folder(preset: str) -> str:
    code = f"from llmcad_mlx.store.names import resolve_target; print(resolve_target({preset!r}, False))"
    done = run([sys.executable, "-c", code])
    if done.returncode != 0:
        raise SystemExit(f"{preset}: cannot be had: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]


def check_inflated(budget: int | None) -> bool:
    """budget: None for the smallest."""
    with tempfile.TemporaryDirectory() as place:
        larger = str(Path(place) / "inflated")
        inflate = [sys.executable, "-m", "convert.inflate", _folder("smollm2-135m"), larger, "--size", "2GB"]
        done = run(inflate)
        if done.returncode != 0:
            raise SystemExit(f"inflate: {done.stderr.strip()[-500:]}")
        size = sum(file.stat().st_size for file in Path(larger).glob("*.safetensors"))
        # 900 layers keep 1.4 MB for each token, so the context is short.
        arguments = ["--target", larger, "--raw", "-m", "32", "--context", "48"]
        name = f"embedded model inflated to {size / MB:.0f} MB"
        return check_smallest(name, arguments) if budget is None else check_pair(name, arguments, budget)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("qwen", "inflated", "mlx-lm"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--smallest", nargs="*", metavar="FOLDER")
    chosen = vars(parser.parse_args())
    smallest = chosen.pop("smallest")
    everything = not any(chosen.values()) and smallest is None
    checks = {
        "qwen": lambda: check_pair("Qwen pair", ["--target", QWEN, "-m", "64"], 1000 * MB),
        "inflated": lambda: check_inflated(600 * MB),
        "mlx_lm": lambda: check_mlx_lm(1000 * MB),
    }
    try:
        good = [check() for name, check in checks.items() if everything or chosen[name]]
        if smallest is not None:
            good.append(check_smallest("embedded model", ["-m", "32"]))
            good.append(check_smallest("Qwen pair", ["--target", QWEN, "-m", "32"]))
            good += [check_smallest(folder, ["--target", folder, "--raw", "-m", "32"]) for folder in smallest]
            good.append(check_inflated(None))
    except NoCgroupError as error:
        print(
            f"skipped: no memory cgroup can be made here ({error}); run it as root, or under systemd-run --scope"
        )
        return 0
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
