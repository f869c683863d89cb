"""Loading a tokenizer without making Python objects of a tokenizer.json.

mlx-lm and transformers parse the file three times, for its decoder, for its added tokens, and for the vocabulary
from which most of transformers' classes build a tokenizer anew: 735 MB for the 33 MB of Gemma 3, where the
tokenizer itself takes 100. Here they get a folder like the model's whose tokenizer.json has everything but the
vocabulary. What they make of it, with all that they know of the model's family, then gets the vocabulary.
"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, _infer_tool_parser
from mlx_lm.utils import _tokenizer_defaults
from mlx_lm.utils import load_tokenizer as load_by_mlx_lm
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from llmcad_mlx.files import read_object
from llmcad_mlx.machine import trim_heap

_FILE = "tokenizer.json"
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_PREFIX, _SUFFIX = "continuing_subword_prefix", "end_of_word_suffix"  # a vocabulary is built with these
_OPTIONS = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
_LOADING_SHARE = 11.2  # bytes a byte of the file, with the 11 MB of Qwen2.5 and the 33 MB of Gemma 3
_LOADING_SHARE_OF_OTHERS = 22.5  # with Python objects: 22.3 with Gemma 3
_OF_TOKENS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(folder: Path, eos_token_ids: Any) -> Any:
    """mlx-lm's TokenizerWrapper of a model folder, without code that the folder brings along.

    It encodes and decodes as the one that mlx-lm loads. Its streaming detokenizer is the general one, which keeps
    no table of all tokens. Raises what mlx-lm, transformers and tokenizers raise for files they do not understand.
    """
    tokenizer = _without_objects(folder, eos_token_ids)
    if tokenizer is None:
        tokenizer = load_by_mlx_lm(folder, {"trust_remote_code": False}, eos_token_ids)
    trim_heap()
    return tokenizer


def tokenizer_loading_bytes(folder: Path) -> int:
    """About the most that `load_tokenizer` takes at a time, beside what the process has already; 0 where the
    folder has no tokenizer.json."""
    file = folder / _FILE
    size = file.stat().st_size if file.is_file() else 0
    if not size:
        return 0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return round(size * (_LOADING_SHARE if content.find(b'"merges"') >= 0 else _LOADING_SHARE_OF_OTHERS))


def _without_objects(folder: Path, eos_token_ids: Any) -> Any:
    """None for a kind of tokenizer that is not known to be the same when it is loaded in two steps."""
    asked = read_object(folder / "tokenizer_config.json")
    if not (folder / _FILE).is_file() or "fix_mistral_regex" in asked:  # changes large vocabularies only
        return None
    whole = Tokenizer.from_file(str(folder / _FILE))
    if not isinstance(whole.model, BPE):
        return None
    try:
        with _without_vocabulary(folder, whole) as skeleton:
            loaded: Any = load_by_mlx_lm(skeleton, {"trust_remote_code": False}, eos_token_ids)
    except Exception:  # some need a token that is there; what is wrong with the folder is told with all of it
        return None
    tokenizer = loaded._tokenizer
    if not _fill(tokenizer, whole) or (loaded._tool_parser is None and _infer_tool_parser(tokenizer)):
        return None
    tokenizer.name_or_path = str(folder)
    if eos_token_ids is None:
        eos_token_ids = (_tokenizer_defaults(folder) or {}).get("eos_token_ids")
    return TokenizerWrapper(  # anew, as it looks up ids
        tokenizer,
        eos_token_ids=[eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids,
        chat_template=loaded._chat_template,
        tool_call_start=loaded._tool_call_start,
        tool_call_end=loaded._tool_call_end,
        tool_parser=loaded._tool_parser,
        response_format=loaded._response_format,
    )


@contextmanager
def _without_vocabulary(folder: Path, whole: Tokenizer) -> Iterator[Path]:
    """A folder with the files of `folder`, but a tokenizer.json that has no tokens except added ones, numbered
    from 0 in the order of their ids."""
    added = [token for _, token in sorted(whole.get_added_tokens_decoder().items())]
    content = {
        "version": "1.0",
        "truncation": whole.truncation,
        "padding": whole.padding,
        "added_tokens": [
            {"id": number, **{name: getattr(token, name) for name in _OF_TOKENS}}
            for number, token in enumerate(added)
        ],
        **{name: _state(getattr(whole, name)) for name in _PARTS},
        "model": {
            "type": "BPE",
            **{name: getattr(whole.model, name) for name in (*_OPTIONS, _PREFIX, _SUFFIX)},
            "vocab": {token.content: number for number, token in enumerate(added)},  # the unknown token is needed
            "merges": [],
        },
    }
    with tempfile.TemporaryDirectory() as place:
        skeleton = Path(place)
        for file in folder.iterdir():
            if file.name != _FILE:
                (skeleton / file.name).symlink_to(file.resolve())
        (skeleton / _FILE).write_text(json.dumps(content), encoding="utf-8")
        yield skeleton


def _state(part: Any) -> Any:
    """A part of a tokenizer as tokenizer.json has it; truncation and padding come as objects of JSON already."""
    return None if part is None else json.loads(part.__getstate__())


def _fill(tokenizer: Any, whole: Tokenizer) -> bool:
    """Give a tokenizer without vocabulary that of `whole`, which then belongs to it. False where what made it may
    have looked at the vocabulary."""
    kind = type(tokenizer)
    native = TokenizersBackend.convert_to_native_format
    if (
        not isinstance(tokenizer, TokenizersBackend)
        or kind.convert_to_native_format.__func__ is not native.__func__
    ):
        return False
    small, model = tokenizer._tokenizer, whole.model
    if not isinstance(small.model, BPE):
        return False
    filled = whole
    if "__init__" in vars(kind):  # builds its own of a vocabulary, and adds what tokens it thinks are added ones
        if any((getattr(small.model, name) or "") != (getattr(model, name) or "") for name in (_PREFIX, _SUFFIX)):
            return False
        for name in _OPTIONS:
            setattr(model, name, getattr(small.model, name))
        filled = Tokenizer(model)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        setattr(filled, name, getattr(small, name))
    known = {token.content for token in filled.get_added_tokens_decoder().values()}
    added = sorted(small.get_added_tokens_decoder().items())
    filled.add_tokens([token for _, token in added if token.content not in known])
    filled.post_processor = _with_ids_of(small.post_processor, filled)
    if small.truncation is not None:
        filled.enable_truncation(**small.truncation)
    if small.padding is not None:
        filled.enable_padding(**{**small.padding, "pad_id": filled.token_to_id(small.padding["pad_token"])})
    filled.encode_special_tokens = small.encode_special_tokens
    tokenizer._tokenizer = filled
    return True


def _with_ids_of(processor: Any, tokenizer: Tokenizer) -> Any:
    """A post-processor that names tokens, with the ids that they have in `tokenizer`."""
    if processor is None:
        return None

    def renumbered(value: Any) -> Any:
        if isinstance(value, list):
            if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int):  # "cls": ["<s>", 0]
                return [value[0], tokenizer.token_to_id(value[0])]
            return [renumbered(inner) for inner in value]
        if isinstance(value, dict):
            found = {name: renumbered(inner) for name, inner in value.items()}
            if {"ids", "tokens"} <= found.keys():
                found["ids"] = [tokenizer.token_to_id(token) for token in found["tokens"]]
            return found
        return value

    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
               "pre_tokenizer": None, "decoder": None, "model": {"type": "BPE", "vocab": {}, "merges": []},
               "post_processor": renumbered(_state(processor))}  # fmt: skip
    return Tokenizer.from_str(json.dumps(content)).post_processor
