"""How fast a model's files can be read here, in which way, and what a busy Python thread costs.

python -m llmcad_mlx.measure.reading FOLDER [--seconds 15]

Reads parts of the weights in FOLDER that the page cache does not hold, past it (direct) and through it, with 1, 4
and 8 threads, in pieces of 4 and 16 MiB; each alone and beside a Python thread that never rests. The best way is
kept, and used by later loads of models on that disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmcad_mlx.files.safetensors import read_weights
from llmcad_mlx.measure.output import Table, number
from llmcad_mlx.sizes import format_size
from llmcad_mlx.streaming.ways import WayRate, best_way, keep_way, measure_ways, reads_of


def ways_table(rates: list[WayRate]) -> Table:
    """A row for each way; rates in GB/s, the share is that of the rate alone."""
    return Table.of(
        "reading",
        [
            {
                "way": "direct" if rate.way.direct else "buffered",
                "readers": str(rate.way.num_readers),
                "pieces": f"{rate.way.piece_bytes >> 20} MiB",
                "alone": number(rate.bytes_per_s / 1e9, 2),
                "beside Python": number(rate.beside_python_bytes_per_s / 1e9, 2),
                "share": number(rate.beside_python_bytes_per_s / rate.bytes_per_s, 2),
                "sample": format_size(rate.sampled_bytes),
                "from": "disk" if rate.from_disk else "cache",
            }
            for rate in rates
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a model")
    parser.add_argument("--seconds", type=float, default=15.0, help="for everything, about")
    args = parser.parse_args()
    reads = reads_of(read_weights(args.folder))
    rates = measure_ways(reads, args.seconds)
    best = best_way(rates)
    keep_way(reads[0].file, best)
    print(ways_table(rates).to_markdown())
    print(f"kept: {best.way}")


if __name__ == "__main__":
    main()
