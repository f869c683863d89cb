"""The same weights, prompt and budget for nunspark (another streamer on MLX, from PyPI) and for us, side by side.

python tests/beside_nunspark.py FOLDER          FOLDER keeps nunspark's environment and models, 4 GB

nunspark needs an older mlx-lm, so it gets an environment of its own. Its models are copies of the preset's with
scales in float32: MLX's CPU kernels are many times slower in float16. Whole processes are timed, one after the
other.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import mlx.core as mx

from llmcad_mlx.store.pull import resolve_draft, resolve_target

PRESET, BUDGET, TOKENS = "qwen2.5-coder-1.5b", "1GB", 12
PROMPT = "Write a Python function that merges two sorted lists."
PACKAGES = ("nunspark==0.13.0", "mlx-lm==0.31.3", "mlx[cpu]" if sys.platform == "linux" else "mlx")
OURS = (sys.executable, "-c", "from llmcad_mlx.cli.main import main; main()")
# A process of its own for each run, so that the peak is that of this run alone.
MEASURE = "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; \
print('PEAK', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"


def prepare(folder: Path) -> Path:
    """nunspark's environment and models; returns its command."""
    command = folder / "environment" / "bin" / "nunspark"
    if not command.exists():
        venv.create(folder / "environment", with_pip=True)
        pip = folder / "environment" / "bin" / "pip"
        subprocess.run([pip, "install", "--quiet", *PACKAGES], check=True)
    for name, source in (("target", resolve_target(PRESET)), ("draft", resolve_draft(PRESET))):
        copy = folder / name
        if not (copy / "model.safetensors").exists():
            copy.mkdir(parents=True, exist_ok=True)
            for file in source.glob("*"):
                if file.suffix != ".safetensors" and not file.name.startswith("llmcad"):
                    (copy / file.name).write_bytes(file.read_bytes())
            weights = mx.load(str(source / "model.safetensors"))
            assert isinstance(weights, dict)
            halves = (mx.float16, mx.bfloat16)
            wide = {k: v.astype(mx.float32) if v.dtype in halves else v for k, v in weights.items()}
            mx.save_safetensors(str(copy / "model.safetensors"), wide, {"format": "mlx"})
    if not (folder / "packed").exists():
        subprocess.run([command, "pack", folder / "target", folder / "packed"], check=True)
    return command


def measure(name: str, command: list[str]) -> None:
    """Run once; print wall time, peak memory and what the program says of itself."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    found = re.search(r"PEAK (\d+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"{name}: ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
    peak = int(found[1]) * (1 if sys.platform == "darwin" else 1024)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "tok/s" in line or "tokens/s" in line]
    print(f"{name}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB; {' '.join(said)}", flush=True)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    nunspark = str(prepare(folder))
    theirs = [nunspark, "generate", str(folder / "packed"), "--prompt", PROMPT, "--budget", BUDGET, "--metrics"]
    theirs += ["--max-tokens", str(TOKENS)]
    ours = [*OURS, "generate", PROMPT, "--target", PRESET, "--memory", BUDGET]
    measure("nunspark, greedy", theirs)
    measure("nunspark, draft model", [*theirs, "--draft-model", str(folder / "draft"), "--num-draft-tokens", "4"])
    measure(f"llmcad-mlx, {TOKENS} tokens", [*ours, "-m", str(TOKENS)])
    measure("llmcad-mlx, 64 tokens", [*ours, "-m", "64"])


if __name__ == "__main__":
    main()
