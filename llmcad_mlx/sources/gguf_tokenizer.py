"""The tokenizer inside a GGUF file as the files transformers reads: tokenizer.json, tokenizer_config.json,
chat_template.jinja, and the token ids for config.json and generation_config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, processors

from llmcad_mlx.errors import ModelError
from llmcad_mlx.sources.gguf_bpe import build_byte_level, byte_level_adds_bos
from llmcad_mlx.sources.gguf_metadata import Metadata
from llmcad_mlx.sources.gguf_sentencepiece import build_sentencepiece
from llmcad_mlx.sources.gguf_vocabulary import TokenType, Vocabulary, read_vocabulary

# Tokens that end a turn in chat models, though a file names only one of them as its end.
_END_TEXTS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "</s>",
)


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Ids for config.json. `ends` holds every token that ends a turn, the file's own first."""

    bos: int | None
    ends: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True, slots=True)
class GgufTokenizer:
    """A tokenizer and what goes with it. `settings` is tokenizer_config.json without the chat template."""

    tokenizer: Tokenizer
    settings: dict[str, object]
    chat_template: str | None
    ids: TokenIds

    def save(self, folder: Path) -> None:
        """Write the files transformers loads; the template as its own file and, for older readers, inside."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        settings = dict(self.settings)
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
            settings["chat_template"] = self.chat_template
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def read_tokenizer(metadata: Metadata) -> GgufTokenizer:
    """Build the tokenizer of a file.

    Raises ModelError for a tokenizer kind or pre-tokenizer that is not known, and for damaged fields.
    """
    vocabulary = read_vocabulary(metadata)
    kind = metadata.text("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = build_byte_level(metadata, vocabulary), byte_level_adds_bos(metadata)
    elif kind == "llama":
        tokenizer, adds_bos = build_sentencepiece(metadata, vocabulary), True
    else:
        raise ModelError(f"{metadata.path}: tokenizer kind {kind!r} is not supported (gpt2 and llama are)")
    tokenizer.add_tokens(vocabulary.added())
    ids = _token_ids(metadata, vocabulary)
    adds_bos = ids.bos is not None and metadata.flag("tokenizer.ggml.add_bos_token", adds_bos)
    if adds_bos and ids.bos is not None:
        bos = vocabulary.tokens[ids.bos]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, ids.bos)]
        )
    template = metadata.text("tokenizer.chat_template", "") or None
    return GgufTokenizer(tokenizer, _settings(metadata, vocabulary, ids, adds_bos), template, ids)


def _token_ids(metadata: Metadata, vocabulary: Vocabulary) -> TokenIds:
    def named(name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if not metadata.has(key):
            return None
        number = metadata.integer(key)
        if not 0 <= number < len(vocabulary.tokens):
            raise metadata.wrong(key, number)
        return number

    ids = vocabulary.ids()
    control = [ids[text] for text in _END_TEXTS if text in ids]
    control = [number for number in control if vocabulary.types[number] == TokenType.CONTROL]
    found = [named("eos"), named("eot"), named("eom"), *control]
    ends = tuple(dict.fromkeys(number for number in found if number is not None))
    if not ends:
        raise metadata.wrong("tokenizer.ggml.eos_token_id", None)
    return TokenIds(bos=named("bos"), ends=ends, pad=named("padding"))


def _settings(metadata: Metadata, vocabulary: Vocabulary, ids: TokenIds, adds_bos: bool) -> dict[str, object]:
    def text(number: int | None) -> str | None:
        return None if number is None else vocabulary.tokens[number]

    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": False,
        "bos_token": text(ids.bos),
        "eos_token": text(ids.ends[0]),
        "pad_token": text(ids.pad),
        "model_max_length": metadata.positive(".context_length"),
    }
    return {key: value for key, value in settings.items() if value is not None}
