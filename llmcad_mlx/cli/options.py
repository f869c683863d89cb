"""Options that several commands share; names and defaults as in mlx-lm where it has them."""

from __future__ import annotations

from typing import Annotated

import typer

Target = Annotated[
    str | None,
    typer.Option("--target", help="Model folder, hub repository or preset. Default: the embedded smollm2-135m."),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        help="Draft model (like --target), n-gram table, 'ngram', 'none', 'auto' for what tune has chosen or the "
        "preset's own; 'self:4' (3, 2): the target in so many bits; '4bit:DRAFT' (2, 3, 8): a draft in so many; "
        "'trimmed:8192:DRAFT': a draft with so many output tokens.",
    ),
]
Policy = Annotated[str, typer.Option("--policy", help="throughput, paper, chain or plain.")]
TreeNodes = Annotated[
    int | None,
    typer.Option("--tree-nodes", help="Nodes per target pass, root included. Default: the policy chooses."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", help="Tokens to generate at most; -1: no limit.")]
Temperature = Annotated[float, typer.Option("--temp", help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus sampling: 0.9 takes the likeliest 90%; 1 is off.")]
TopK = Annotated[int, typer.Option("--top-k", help="Sample from the k most likely tokens; 0 is off.")]
MinP = Annotated[float, typer.Option("--min-p", help="Least probability, relative to the best; 0 is off.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same text, under every policy.")]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What the whole process may use, like 6GB; the target streams from the disk.",
    ),
]
Pinned = Annotated[
    str,
    typer.Option("--pinned", metavar="SIZE|auto", help="How much of a streamed target stays in memory."),
]
Context = Annotated[
    int | None,
    typer.Option("--context", help="Tokens to make room for under a budget. Default: up to 4096."),
]
ReadBandwidth = Annotated[
    str | None,
    typer.Option(
        "--read-bandwidth",
        metavar="RATE",
        help="Emulate slower storage, like 250MB/s; figures are marked emulated.",
    ),
]
Pipeline = Annotated[
    bool, typer.Option("--pipeline/--no-pipeline", help="Draft on while the target's weights load.")
]
Tree = Annotated[bool, typer.Option("--tree/--no-tree", help="Grow branches, or one line only.")]
Fallback = Annotated[
    bool,
    typer.Option(
        "--fallback/--no-fallback", help="Let the policy stop drafting, or always draft the same number."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
