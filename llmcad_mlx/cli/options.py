"""Options that several commands share; names as in mlx-lm where it has them.

A group of options makes one record and shows its defaults. A command takes the record as a keyword parameter;
`with_options` puts the group's options in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any

from typer import Argument, Context, Option

from llmcad_mlx.errors import UsageError
from llmcad_mlx.settings import MemoryOptions, SamplingSettings, SpeculationSettings

Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]
MaxTokens = Annotated[int, Option("--max-tokens", "-m", help="Tokens to generate at most; -1: no limit.")]
TemplateConfig = Annotated[
    str | None,
    Option(
        "--chat-template-config",
        "--chat-template-args",
        metavar="JSON",
        help='Variables of the chat template, like {"enable_thinking": false}.',
    ),
]
Temperature = Annotated[float, Option("--temp", help="Sampling temperature; 0 is greedy.")]
Seed = Annotated[int, Option(help="Same seed, same text, under every policy.")]


@dataclass(frozen=True, slots=True)
class PairOptions:
    """The target and the draft, as `llmcad_mlx.load` takes them."""

    target: str | None = None
    draft: str = "auto"

    @classmethod
    def of(cls, model: str | None = None, target: str | None = None, draft: str = "auto") -> PairOptions:
        """The target as an argument or as an option. Raises UsageError where both are given."""
        return cls(one_target(model, target), draft)


def one_target(model: str | None = None, target: str | None = None) -> str | None:
    """The one that is given. Raises UsageError for two."""
    if model is not None and target is not None:
        raise UsageError(f"target: {model} or {target}? Name one model, with --target or without")
    return target if model is None else model


@dataclass(frozen=True, slots=True)
class _Group:
    """make: builds the record, or raises UsageError; its parameters have the defaults. options: a parameter's name
    → what Typer shows for it."""

    make: Callable[..., Any]
    options: Mapping[str, Any]


_TARGET = {
    "target": Annotated[
        str | None, Option(help="Model folder, hub repository or preset. Default: the embedded smollm2-135m.")
    ],
}
_MODEL = {"model": Annotated[str | None, Argument(metavar="[MODEL]", help="The same as --target.")]}
_PAIR = {
    **_TARGET,
    "draft": Annotated[
        str,
        Option(
            help="Draft model (like --target), n-gram table, 'ngram', 'none', 'auto' for what tune has chosen or "
            "the preset's own; 'self:4' (3, 2): the target in so many bits; '4bit:DRAFT' (2, 3, 8): a draft in "
            "so many; 'trimmed:8192:DRAFT': a draft with so many output tokens."
        ),
    ],
}
_MEMORY = {
    "memory": Annotated[
        str | None,
        Option(metavar="SIZE", help="What the whole process may use, like 6GB; the target streams from the disk."),
    ],
    "pinned": Annotated[str, Option(metavar="SIZE|auto", help="How much of a streamed target stays in memory.")],
    "context": Annotated[int | None, Option(help="Tokens to make room for under a budget. Default: up to 4096.")],
    "read_bandwidth": Annotated[
        str | None,
        Option(metavar="RATE", help="Emulate slower storage, like 250MB/s; figures are marked emulated."),
    ],
}
_VERIFY = {"verify": Annotated[bool, Option("--verify", help="Check a bundle's bytes at load and on every read.")]}
_SPECULATION = {
    "policy": Annotated[str, Option(help="throughput, paper, chain or plain.")],
    "tree_nodes": Annotated[
        int | None, Option(help="Nodes per target pass, root included. Default: the policy chooses.")
    ],
    "pipeline": Annotated[
        bool, Option("--pipeline/--no-pipeline", help="Draft on while the target's weights load.")
    ],
    "tree": Annotated[bool, Option("--tree/--no-tree", help="Grow branches, or one line only.")],
    "fallback": Annotated[
        bool,
        Option("--fallback/--no-fallback", help="Let the policy stop drafting, or always draft the same number."),
    ],
}
_SAMPLING = {
    "temperature": Temperature,
    "top_p": Annotated[float, Option(help="Nucleus sampling: 0.9 takes the likeliest 90%; 1 is off.")],
    "top_k": Annotated[int, Option(help="Sample from the k most likely tokens; 0 is off.")],
    "min_p": Annotated[float, Option(help="Least probability, relative to the best; 0 is off.")],
    "seed": Seed,
}
_PENALTIES = {
    "repetition_penalty": Annotated[float, Option(help="Divides logits of recent tokens; 0 is off.")],
    "presence_penalty": Annotated[float, Option(help="Taken off logits of recent tokens.")],
    "frequency_penalty": Annotated[float, Option(help="The same, for each time a token occurred.")],
}

Target = Annotated[str | None, _Group(one_target, {**_MODEL, **_TARGET})]
Pair = Annotated[PairOptions, _Group(PairOptions.of, {**_MODEL, **_PAIR})]
OptionalPair = Annotated[PairOptions, _Group(PairOptions, _PAIR)]
"""For a command whose argument is something else."""
Memory = Annotated[MemoryOptions, _Group(MemoryOptions.of, _MEMORY)]
VerifiedMemory = Annotated[MemoryOptions, _Group(MemoryOptions.of, {**_MEMORY, **_VERIFY})]
Speculation = Annotated[SpeculationSettings, _Group(SpeculationSettings, _SPECULATION)]
Sampling = Annotated[SamplingSettings, _Group(SamplingSettings, _SAMPLING)]
PenalisedSampling = Annotated[SamplingSettings, _Group(SamplingSettings, {**_SAMPLING, **_PENALTIES})]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer takes it: a parameter that a group makes is replaced by the group's options."""
    groups: dict[str, _Group] = {}
    shown: list[Parameter] = []
    for name, parameter in signature(command, eval_str=True).parameters.items():
        marks = getattr(parameter.annotation, "__metadata__", ())
        if marks and isinstance(marks[0], _Group):
            groups[name] = marks[0]
            known = signature(marks[0].make).parameters
            shown += [
                Parameter(option, Parameter.KEYWORD_ONLY, default=known[option].default, annotation=annotation)
                for option, annotation in marks[0].options.items()
            ]
        else:
            shown.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def call(**values: Any) -> None:
        given = {
            name: group.make(**{option: values.pop(option) for option in group.options})
            for name, group in groups.items()
        }
        command(**values, **given)

    call.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    call.__annotations__ = {}  # of `command`, which Typer would look at as well
    return call


def given(command: Context) -> list[str]:
    """Names of the parameters that were given on the command line."""
    sources = {name: command.get_parameter_source(name) for name in command.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
