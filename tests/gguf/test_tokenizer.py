"""Tokenizers out of GGUF files: the same ids as the original, and text that survives the way there and back."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_lm.tokenizer_utils
import pytest
import sentencepiece
from gguf.constants import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmcad_mlx.detokenizer import Detokenizer, repair_decoder
from llmcad_mlx.errors import ModelError
from llmcad_mlx.gguf.convert import convert_gguf
from llmcad_mlx.gguf.reader import read_gguf_header
from llmcad_mlx.gguf.tokenizer import read_tokenizer
from llmcad_mlx.models.folder import load_model_folder
from llmcad_mlx.progress import progress_for
from llmcad_mlx.store.names import pull_part
from tests.support.tiny import tiny_llama
from tests.support.tiny_folder import write_folder
from tests.support.tiny_gguf import END, TEMPLATE, write_tiny_gguf

CORPUS = (
    "Hello world",
    "def f(x):\n    return x**2  # comment\n\n\tfoo",
    "Der Wetterbericht: 12345 Grüße, naïve café!",
    "今天天气很好，我们去公园吧。",
    "Привет, мир! 123",
    "こんにちは世界 🙂👩‍👩‍👧",
    "مرحبا بالعالم",
    "   leading  spaces\t\ttabs\r\n\r\nend   ",
    "I'll we've DON'T isn't",
    "SELECT * FROM t WHERE a>=10 AND b!='x';",
    "",
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    convert_gguf(write_tiny_gguf(folder / "tiny.gguf"), folder / "out")
    return folder / "out"


def tokenizer_of(tmp_path: Path, **fields: Any) -> Tokenizer:
    """The tokenizer of the tiny file with other `fields`: their names without tokenizer.ggml."""
    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    header.metadata.update({f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    return read_tokenizer(header).tokenizer


@settings(deadline=None, max_examples=100)
@given(text=st.text())
def test_any_text_survives(tiny_folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_and_special_tokens(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert tokenizer.tokenize("hello world") == ["hello", "Ġw", "o", "r", "l", "d"]
    ids = tokenizer.encode(f"he{END}")
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", END]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he"
    assert tokenizer.eos_token == END
    assert not any(token.startswith("[PAD") for token in tokenizer.get_vocab())


def test_mlx_lm_finds_template_end_and_fast_detokenizer(tiny_folder: Path) -> None:
    tokenizer = mlx_lm.tokenizer_utils.load(tiny_folder)
    assert isinstance(tokenizer.detokenizer, mlx_lm.tokenizer_utils.BPEStreamingDetokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == f"hello{END}"
    end = tokenizer.get_vocab()[END]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tiny_folder / name).read_text())["eos_token_id"] == [end]
    assert (tiny_folder / "chat_template.jinja").read_text() == TEMPLATE
    assert json.loads((tiny_folder / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE


@pytest.mark.parametrize(
    ("fields", "family", "assumed"),
    [
        ({"pre": None}, "llama", "gpt-2"),
        ({"pre": ""}, "llama", "gpt-2"),
        ({"pre": "default"}, "qwen2", "qwen2"),
        ({"pre": None}, "qwen3", "qwen2"),
        ({"pre": None, "tokens": 5}, "llama", "llama-bpe"),
        ({"pre": "smollm"}, "qwen2", None),
    ],
)
def test_a_pre_tokenizer_that_is_not_named_is_assumed(
    tmp_path: Path, fields: dict[str, Any], family: str, assumed: str | None
) -> None:
    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    if "tokens" in fields:
        header.metadata["tokenizer.ggml.tokens"][-1] = "<|begin_of_text|>"
    header.metadata.update({"general.architecture": family, f"{family}.context_length": 64})
    header.metadata["tokenizer.ggml.pre"] = fields["pre"]
    if fields["pre"] is None:
        del header.metadata["tokenizer.ggml.pre"]
    found = read_tokenizer(header)
    assert found.assumed == assumed
    named = {**header.metadata, "tokenizer.ggml.pre": assumed or "smollm"}
    expected = read_tokenizer(replace(header, metadata=named)).tokenizer
    text = "It's 12345 hello\n\n\tx"
    assert found.tokenizer.encode(text).ids == expected.encode(text).ids


def test_what_is_assumed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "old.gguf"
    data = write_tiny_gguf(tmp_path / "tiny.gguf").read_bytes()
    file.write_bytes(data.replace(b"tokenizer.ggml.pre", b"tokenizer.ggml.old"))
    convert_gguf(file, tmp_path / "out", progress=progress_for(True))
    line = f"{file}: does not name its pre-tokenizer (tokenizer.ggml.pre); 'gpt-2' is assumed"
    assert capsys.readouterr().err.count(line) == 1
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "other", progress=progress_for(True))
    assert "assumed" not in capsys.readouterr().err


def test_bos_only_where_the_file_asks_for_it(tmp_path: Path) -> None:
    assert tokenizer_of(tmp_path, bos_token_id=5).encode("he").tokens == ["he"]
    with_bos = tokenizer_of(tmp_path, bos_token_id=5, add_bos_token=True)
    assert with_bos.encode("he").ids[0] == 5
    assert with_bos.encode("he", add_special_tokens=False).tokens == ["he"]


def pieces_of(tokenizer: Any, text: str) -> str:
    """The text again, token by token."""
    detokenizer = Detokenizer(tokenizer, cleans_up=False)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return "".join(map(detokenizer.push, tokens)) + detokenizer.flush()


@pytest.mark.parametrize("word", ["đem", "ilÖve", "日本é", "čaj"])
def test_added_tokens_of_a_file_are_read_as_they_are(tmp_path: Path, word: str) -> None:
    header = read_gguf_header(write_tiny_gguf(tmp_path / "tiny.gguf"))
    at = header.metadata["tokenizer.ggml.tokens"].index("[PAD0]")
    header.metadata["tokenizer.ggml.tokens"][at] = word
    header.metadata["tokenizer.ggml.token_type"][at] = int(TokenType.USER_DEFINED)
    read_tokenizer(header).save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    repair_decoder(tokenizer)
    assert at in tokenizer.encode(f"he{word} he")
    assert pieces_of(tokenizer, f"he{word} he") == f"he{word} he"


SPACED = ["He", "'s", "Ġin", "ĠNewYork", "Ġ"]


@pytest.mark.parametrize(
    ("pre", "pieces", "bos"),
    [
        ("gpt-2", ["He", "'s", "Ġin", "ĠNewYork", "Ġ1234", "/", "Ċ"], False),
        ("smollm", [*SPACED, "1", "2", "3", "4", "/", "Ċ"], False),
        ("qwen2", [*SPACED, "1", "2", "3", "4", "/Ċ"], False),
        ("deepseek-r1-qwen", [*SPACED, "1", "2", "3", "4", "/Ċ"], False),
        ("llama-bpe", [*SPACED, "123", "4", "/Ċ"], True),
        ("smaug-bpe", [*SPACED, "123", "4", "/Ċ"], False),
        ("dbrx", [*SPACED, "123", "4", "/Ċ"], False),
        ("gpt-4o", ["He's", "Ġin", "ĠNew", "York", "Ġ", "123", "4", "/Ċ"], False),
    ],
)
def test_text_is_cut_as_each_family_does(tmp_path: Path, pre: str, pieces: list[str], bos: bool) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre, bos_token_id=5)
    found = tokenizer.pre_tokenizer.pre_tokenize_str("He's in NewYork 1234/\n")
    assert [piece for piece, _ in found] == pieces
    assert (tokenizer.encode("He").ids[0] == 5) == bos  # where the file does not say


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported (supported: gpt-2, "),
        ({"model": "t5"}, "tokenizer kind 't5' is not supported (gpt2 and llama are)"),
        ({"merges": ["h q"]}, "tokenizer.ggml.merges is missing or unusable ('h q')"),
        ({"token_type": [1, 1]}, "2 types for"),
        ({"tokens": ["a", "a"]}, "types for 2 tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "no tokens, or one that occurs twice"),
        ({"eos_token_id": 10**6}, "eos_token_id is missing or unusable (1000000)"),
    ],
)
def test_unusable_fields_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        tokenizer_of(tmp_path, **fields)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 30), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=9,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


def test_scored_pieces_give_sentencepiece_ids(tmp_path: Path, spm: sentencepiece.SentencePieceProcessor) -> None:
    ids = range(spm.vocab_size())
    types = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
    tokenizer = tokenizer_of(
        tmp_path,
        model="llama",
        tokens=[spm.id_to_piece(i) for i in ids],
        scores=[spm.get_score(i) for i in ids],
        token_type=types,
        bos_token_id=spm.bos_id(),
        eos_token_id=spm.eos_id(),
    )
    for text in (*CORPUS, "unseen: ŋ ☃ words", "hello hello"):
        assert tokenizer.encode(text).ids == [spm.bos_id(), *spm.encode(text)], text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_folder_with_the_original_file_alone(tmp_path: Path, spm: sentencepiece.SentencePieceProcessor) -> None:
    """Llama 2 as some publish it, without tokenizer.json: every blank but the first is kept, on every line."""
    model = tiny_llama(0, vocab=spm.vocab_size())
    args = {key: value for key, value in vars(model.args).items() if value is not None and key != "layer_types"}
    folder = write_folder(tmp_path / "model", model, {**args, "max_position_embeddings": 64})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "tokenizer.model").write_bytes(spm.serialized_model_proto())
    tokenizer = load_model_folder(folder).tokenizer
    for text in ("def f:\n    return x", "if x:\n\n   a  b\n ", *(f"x{text}" for text in CORPUS)):
        assert pieces_of(tokenizer, text) == text


@pytest.mark.large
@pytest.mark.parametrize("part", ["target", "draft"])
def test_qwen_tokenizer(part: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pull_part("qwen2.5-coder-1.5b", part))
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)
    assert tokenizer.encode("Hello world") == [9707, 1879]
    assert tokenizer.encode("<|im_start|>user\n") == [151644, 872, 198]
    assert len(tokenizer) == 151665  # as in the publisher's tokenizer.json: no padding entries
    assert tokenizer.eos_token_id == 151645
