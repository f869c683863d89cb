"""What users give as a prompt, as token ids."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llmcad_mlx.errors import UsageError
from llmcad_mlx.prompt import encode_prompt
from tests.support.tiny_folder import SPECIAL, VOCAB, make_tokenizer

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content | trim }}"
    "{% for call in message.tool_calls or [] %}!{{ call.function.arguments.a }}{% endfor %}<|im_end|>{% endfor %}"
)
TOKENIZER = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), chat_template=TEMPLATE))
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": "b"}'}}


def text_of(*messages: dict[str, Any]) -> str:
    return str(TOKENIZER.decode(encode_prompt(messages, TOKENIZER, VOCAB)))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "user ab"),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "assistant !b"),
        ({"role": "assistant", "tool_calls": [CALL]}, "assistant !b"),
        ({"role": "assistant", "content": "x", "tool_calls": None, "name": None}, "assistant x"),
        ({"role": "developer", "content": "x"}, "system x"),
    ],
)
def test_messages_come_to_the_template_as_it_expects_them(message: dict[str, Any], text: str) -> None:
    assert text_of(message) == f"<|im_start|>{text}<|im_end|>"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "image_url parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"^prompt: messages\[0\].content\[0\]: no text"),
        ([{"role": "user", "content": 5}], r"^prompt: messages\[0\].content: give text"),
        ([{"role": "user"}], r"^prompt: messages\[0\].content: is missing"),
        ([{"content": "x"}], r"^prompt: messages\[0\].role: give"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "only the assistant calls tools"),
        ("caf\udce9", "prompt: it is not UTF-8 text"),
        ([{"role": "user", "content": "\ud83d"}], "prompt: it is not UTF-8 text"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(prompt: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        encode_prompt(prompt, TOKENIZER, VOCAB)


def test_a_begin_token_comes_once() -> None:
    """By the tokenizer where neither the text nor the template has it."""
    fast, begin = make_tokenizer(), SPECIAL[0]
    fast.post_processor = TemplateProcessing(single=[begin, "$A"], special_tokens=[(begin, 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=begin, chat_template=TEMPLATE)
    tokenizer = TokenizerWrapper(made)
    for prompt in ("a", f"{begin}a", [{"role": "user", "content": "a"}]):
        tokens = encode_prompt(prompt, tokenizer, VOCAB)
        assert (tokens[0], tokens.count(0)) == (0, 1)
