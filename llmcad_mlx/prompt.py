"""What users give as a prompt (text, token ids, chat messages) as token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from llmcad_mlx.errors import UsageError, first_line

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


TEMPLATE_OPTION = "chat-template-config"
_PROMPT_END = 24  # tokens that hold the tag of thinking and the white space after it
_NEEDED = 'every message needs a "role" and a "content"'
_NOT_THE_TEMPLATES = {
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask",
}  # fmt: skip


def check_template_options(option: str, variables: Mapping[str, Any]) -> None:
    """Raise UsageError for a variable of chat templates that is none, but says what to do with the template."""
    for name in variables:
        if name in _NOT_THE_TEMPLATES:
            raise UsageError(f"{option}.{name}: is not a variable of the chat template; leave it out")


def template_options(text: str | None) -> dict[str, Any]:
    """Variables of the chat template, typed as a JSON object; none for None. Raises UsageError."""
    try:
        found = json.loads(typed_text(text or "{}", TEMPLATE_OPTION))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f'{TEMPLATE_OPTION}: {text!r} is no JSON object; write it like {{"enable_thinking": false}}'
        )
    check_template_options(TEMPLATE_OPTION, found)
    return found


def typed_text(text: str, option: str) -> str:
    """What was typed, on a command line or a terminal. It is UTF-8 in every locale, also where Python could not
    read it so. Raises UsageError beginning with `option` for other bytes."""
    try:
        return os.fsencode(text).decode("utf-8") if any("\ud800" <= c <= "\udfff" for c in text) else text
    except UnicodeError:
        raise UsageError(f"{option}: is not UTF-8 text") from None


def encode_prompt(
    prompt: Prompt,
    tokenizer: Any,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt; at least one. `tools`: functions that the chat template shows with messages.
    `template_options`: other variables of the template, like {"enable_thinking": False}.

    Text gets the tokenizer's special tokens unless it begins with them, as in mlx-lm; messages go through the
    chat template. Token ids may be any sequence of integers, arrays included. Raises UsageError for a prompt that
    is empty, malformed, or not in the vocabulary.
    """
    if isinstance(prompt, str):
        tokens = _encode_text(prompt, tokenizer, special=True)
    else:
        items = as_list(prompt)
        is_chat = bool(items) and all(isinstance(item, Mapping) for item in items)
        options = {**(template_options or {}), **({"tools": list(tools)} if tools else {})}
        tokens = (
            _encode_chat([dict(m) for m in items], tokenizer, options)
            if is_chat
            else [token_id(item) for item in items]
        )
    if not tokens:
        raise UsageError("prompt: it is empty; give text, messages or at least one token")
    for token in tokens:  # a model would read beyond its embeddings, not complain
        if not 0 <= token < vocab_size:
            raise UsageError(f"prompt: token {token} is not in the vocabulary of {vocab_size}")
    return tokens


def opened_thinking(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The tag of thinking at the end of a chat's prompt, and the blanks after it: some templates open the block
    themselves. "" where the answer does not begin within thinking. `tokenizer`: mlx-lm's TokenizerWrapper."""
    if not tokenizer.has_thinking:
        return ""
    end = str(tokenizer.decode(list(prompt[-_PROMPT_END:])))
    start = end.rfind(tokenizer.think_start)
    return end[start:] if start >= 0 and end[start:].rstrip() == tokenizer.think_start else ""


def as_list(prompt: Any) -> list[Any]:
    """The token ids or messages of a prompt that is no text."""
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        return list(prompt)
    raise UsageError(f"prompt: give text, a list of token ids or a list of messages, not {type(prompt).__name__}")


def _encode_text(text: str, tokenizer: Any, special: bool) -> list[int]:
    """special: with the tokens that the tokenizer puts around a text, unless it begins with them."""
    if not text:
        return []
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8, as Python reads them from a terminal
        raise UsageError("prompt: it is not UTF-8 text") from None
    special = special and (tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token))
    # Not verbose: prompts that are too long are this package's to report.
    return list(tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any, options: Mapping[str, Any]) -> list[int]:
    return _encode_text(chat_text(messages, tokenizer, options), tokenizer, special=False)


def chat_text(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, options: Mapping[str, Any], is_asked: bool = True
) -> str:
    """What the model's chat template makes of messages. is_asked: an answer is to follow. Raises UsageError."""
    made = [template_message(message, f"prompt: messages[{number}]") for number, message in enumerate(messages)]
    if not tokenizer.has_chat_template:
        raise UsageError("prompt: this model has no chat template; give the prompt as text")
    try:
        text = tokenizer.apply_chat_template(made, tokenize=False, add_generation_prompt=is_asked, **options)
    except Exception as error:  # templates are programs: they raise what they like at messages they cannot take
        raise UsageError(f"prompt: the model's chat template refuses the messages: {first_line(error)}") from error
    return str(text)


def template_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A message in OpenAI's form as chat templates expect it: content is text, the arguments of calls are objects.

    An answer's `reasoning` becomes `reasoning_content`, as templates name it; other fields stay as they are.
    Raises UsageError beginning with `where` for a message without a role, one without content that is not the
    assistant's, content that is not text, and calls that are not the assistant's.
    """
    made = {name: value for name, value in message.items() if value is not None}
    if not isinstance(made.get("role"), str):
        raise UsageError(f'{where}.role: give "system", "user" or "assistant"; {_NEEDED}')
    calls = made.get("tool_calls")
    if calls and made["role"] != "assistant":
        raise UsageError(f"{where}.tool_calls: only the assistant calls tools")
    if "content" not in made and made["role"] != "assistant":
        raise UsageError(f"{where}.content: is missing; {_NEEDED}")
    if "reasoning" in made:
        made.setdefault("reasoning_content", made.pop("reasoning"))
    made["content"] = _content_text(made.get("content", ""), f"{where}.content")
    if made["role"] == "developer":
        made["role"] = "system"
    if calls:
        made["tool_calls"] = [_template_call(call) for call in calls]
    return made


def _content_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise UsageError(f"{where}: give text, or a list of text parts")
    content = [text_part(part) for part in content]
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = (
                f"{kind} parts are not taken, only text" if isinstance(kind, str) and kind != "text" else "no text"
            )
            raise UsageError(f"{where}[{number}]: {what}")
    return "".join(part["text"] for part in content)


def text_part(part: Any) -> Any:
    """A part of a message's content; a refusal, which is what the model said, as text."""
    match part:
        case {"type": "refusal", "refusal": str(text)}:
            return {"type": "text", "text": text}
    return part


def _template_call(call: Any) -> Any:
    """A call, with its arguments read where they are JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    with suppress(ValueError):
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"] or "{}")}}
    return call


def token_id(item: Any) -> int:
    """An item of a prompt that holds no messages."""
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        raise UsageError(f"prompt: {item!r} is neither a token id nor a message")
    return int(item)
