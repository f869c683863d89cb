"""mlx-lm's loading with config.json as its publisher's code reads it, and what is known of a model loaded without.

mlx-lm takes from defaults what it does not find in a config.json where it looks; see `models.config`. Of a model
that somebody hands over only its arguments are known, and by its tokenizer the folder: where mlx-lm has read the
folder's config otherwise than it is meant, the model is refused rather than run.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.nn.layers.base import Module

from llmcad_mlx.errors import ModelError, UsageError
from llmcad_mlx.files import read_object
from llmcad_mlx.files.safetensors import read_weights
from llmcad_mlx.models.config import completed, correct_rope, own_limit

_LOG = logging.getLogger("llmcad_mlx.mlx_lm_plugin")
_mlx_lm_load_model = mlx_lm.utils.load_model

_MOST_TOKENS = "llmcad_mlx_most_tokens"

Place = tuple[Any, str, Any]
"""An object, the name of something in it, and what to put there."""


def load(path_or_hf_repo: str, *arguments: Any, **options: Any) -> Any:
    """As mlx_lm's function of that name, reading config.json as the publisher's code does.

    Raises ModelError for a config of which mlx-lm would ignore a part, and what mlx-lm raises.
    """
    with replaced([(mlx_lm.utils, "load_model", load_model)]):
        return mlx_lm.utils.load(path_or_hf_repo, *arguments, **options)


def load_model(
    model_path: Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    *arguments: Any,
    **options: Any,
) -> tuple[Module, dict[str, Any]]:
    """As mlx_lm's function of that name; see `load`."""
    folder = Path(model_path)
    config = mlx_lm.utils.load_config(folder) | (model_config or {})
    config = _as_published(folder, config, _weight_names(folder))
    model, config = _mlx_lm_load_model(model_path, lazy, strict, config, *arguments, **options)
    correct_rope(model, config, folder)
    if (most := own_limit(config)) is not None:
        setattr(model, _MOST_TOKENS, most)
    return model, config


def most_tokens(model: Any) -> int | None:
    """Tokens up to which a model that `load_model` has loaded computes what its publisher's does; None: all."""
    most: int | None = getattr(model, _MOST_TOKENS, None)
    return most


@contextmanager
def replaced(places: list[Place]) -> Iterator[None]:
    """Other things in these places while this is open."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for place in places:
            setattr(*place)
        yield
    finally:
        for place in before:
            setattr(*place)


def check_reading(model: Any, tokenizer: Any) -> None:
    """Raise UsageError where `model` is as mlx-lm alone reads the config.json of the tokenizer's folder, and its
    publisher's code reads something else there; ModelError where mlx-lm ignores a part of it.

    A model that is not this folder's, or was built with other settings, passes: nothing is known of it.
    """
    named = getattr(tokenizer, "name_or_path", "")
    if not named or not (folder := Path(named)).joinpath("config.json").is_file():
        return
    try:
        config = mlx_lm.utils.load_config(folder)
        model_class, args_class = mlx_lm.utils._get_classes(config)
        as_loaded = args_class.from_dict(copy.deepcopy(config))
    except Exception:  # not a model's folder, or one of another mlx-lm
        return
    args: Any = getattr(model, "args", None)
    if not isinstance(args, args_class) or args != as_loaded:
        return
    try:
        names = _weight_names(folder)
    except ModelError:  # changed since
        return
    published = _as_published(folder, config, names)
    if (most := own_limit(published)) is not None:
        _LOG.warning(
            "%s: mlx-lm computes as the publisher's code does up to %d tokens; beyond, the text is another",
            folder,
            most,
        )
    random: Any = mx.random.state
    high, low = random[0].tolist()  # new modules draw their weights, and a caller may have set a seed
    try:
        meant = model_class(args_class.from_dict(copy.deepcopy(published)))
        correct_rope(meant, published, folder)
        difference = _difference(model, model_class(as_loaded), meant)
    except ModelError:
        raise
    except Exception:  # mlx-lm cannot build it at all
        return
    finally:
        mx.random.seed(high << 32 | low)
    if difference:
        raise UsageError(
            f"model: mlx-lm reads {folder / 'config.json'} otherwise than its publisher's code does "
            f"({difference}); load it with llmcad_mlx.mlx_lm_plugin.load"
        )


def _weight_names(folder: Path) -> set[str]:
    """Raises ModelError for files that are damaged."""
    names = set(read_object(folder / "model.safetensors.index.json").get("weight_map") or ())
    if any(folder.glob("model*.safetensors")):  # where a part of the model is enough, there may be none yet
        names |= read_weights(folder).keys()
    return names


def _as_published(folder: Path, config: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Raises ModelError for what mlx-lm would ignore. names: of the tensors in the files."""
    if config.get("model_file") is not None:  # its own code knows what it means
        return config
    return completed(folder, config, names)


def _difference(model: Any, loaded: Any, published: Any) -> str:
    """The first setting of a module, by its path, in which `loaded` and `published` differ, and in which `model`
    is not as it is meant, for its weights may be quantised or its modules replaced; "" where there is none."""
    held, ours, theirs = (
        {name: _settings(module) for name, module in one.named_modules()} for one in (model, loaded, published)
    )
    for path in [*ours, *(theirs.keys() - ours.keys())]:
        if (path in ours) != (path in theirs):
            if (path in held) != (path in theirs):
                return f"it has {'a' if path in theirs else 'no'} {path}"
            continue
        for name in sorted(ours[path].keys() | theirs[path].keys()):
            mine, other = ours[path].get(name), theirs[path].get(name)
            if mine != other and held.get(path, {}).get(name) != other:
                return f"{path}.{name} is {other}, not {mine}" if path else f"{name} is {other}, not {mine}"
    return ""


def _settings(module: Any) -> Mapping[str, Any]:
    """What a module computes with beside weights; of these the shapes."""
    found: dict[str, Any] = {}
    for name, value in {**vars(module), **module}.items():
        if isinstance(value, mx.array):
            found[name] = value.tolist() if name.startswith("_") else value.shape
        elif isinstance(value, bool | int | float | str | tuple | None):
            found[name] = value
    return found
