"""The embedded model as it comes out of its real GGUF file: what it computes, and how it cuts text."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from transformers import AutoTokenizer

from llmcad_mlx.store.names import pull_part
from tests.support.real_text import PASSAGE

pytestmark = pytest.mark.embedded


def test_the_loss_is_that_of_a_plain_llama_on_dequantised_weights() -> None:
    """Computed in numpy from the file's own values and rotation, by the `gguf` package's dequantisers."""
    model, tokenizer = mlx_lm.load(str(pull_part("smollm2-135m", "target")))
    model.set_dtype(mx.float32)
    ids = mx.array([tokenizer.encode(PASSAGE, add_special_tokens=False)])
    loss = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")
    assert float(loss) == pytest.approx(3.503, abs=1e-3)


def test_the_tokenizer_is_the_files_own() -> None:
    """Ids by byte-pair merging by the book, from the file's lists of tokens and merges."""
    tokenizer = AutoTokenizer.from_pretrained(pull_part("smollm2-135m", "target"))
    for text, ids in (
        (
            "def f(x):\n    return x**2  # comment\n\n\tfoo",
            [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 5189, 1116, 197, 15236],
        ),
        (
            "SELECT * FROM t WHERE a>=10 AND b!='x';",
            [23428, 1672, 18451, 252, 28531, 253, 31615, 33, 32, 7485, 278, 17, 2069, 104, 36651],
        ),
        ("Привет, мир! 123", [155, 249, 46879, 16464, 32547, 28, 41337, 7872, 9175, 17, 216, 33, 34, 35]),
        (
            "   leading  spaces\t\ttabs\r\n\r\nend   ",
            [256, 2899, 216, 5600, 197, 197, 100, 7366, 7209, 198, 486, 333],
        ),
        ("I'll we've DON'T isn't", [57, 3060, 392, 3543, 422, 2154, 23, 68, 3247, 982]),
    ):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
