"""What users give as a prompt (text, token ids, chat messages) as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmcad_mlx.errors import UsageError, first_line

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def encode_prompt(
    prompt: Prompt, tokenizer: Any, vocab_size: int, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Token ids of a prompt; at least one. `tools`: functions that the chat template shows with messages.

    Text gets the tokenizer's special tokens unless it begins with them, as in mlx-lm; messages go through the
    chat template. Token ids may be any sequence of integers, arrays included. Raises UsageError for a prompt that
    is empty, malformed, or not in the vocabulary.
    """
    if isinstance(prompt, str):
        tokens = _encode_text(prompt, tokenizer)
    else:
        items = as_list(prompt)
        is_chat = bool(items) and all(isinstance(item, Mapping) for item in items)
        tokens = (
            _encode_chat([dict(m) for m in items], tokenizer, tools)
            if is_chat
            else [token_id(item) for item in items]
        )
    if not tokens:
        raise UsageError("prompt: it is empty; give text, messages or at least one token")
    for token in tokens:  # a model would read beyond its embeddings, not complain
        if not 0 <= token < vocab_size:
            raise UsageError(f"prompt: token {token} is not in the vocabulary of {vocab_size}")
    return tokens


def as_list(prompt: Any) -> list[Any]:
    """The token ids or messages of a prompt that is no text."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return list(prompt)
    raise UsageError(f"prompt: give text, a list of token ids or a list of messages, not {type(prompt).__name__}")


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    if not text:
        return []
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    # Not verbose: prompts that are too long are this package's to report.
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _encode_chat(
    messages: list[dict[str, Any]], tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None
) -> list[int]:
    for message in messages:
        if not isinstance(message.get("role"), str) or "content" not in message:
            raise UsageError('prompt: every message needs a "role" and a "content"')
    if not tokenizer.has_chat_template:
        raise UsageError("prompt: this model has no chat template; give the prompt as text")
    try:
        options: dict[str, Any] = {"tools": list(tools)} if tools else {}
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # templates are programs: they raise what they like at messages they cannot take
        raise UsageError(f"prompt: the model's chat template refuses the messages: {first_line(error)}") from error
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def token_id(item: Any) -> int:
    """An item of a prompt that holds no messages."""
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise UsageError(f"prompt: {item!r} is neither a token id nor a message")
    return int(item)
