"""mlx-lm drop-in: a program written for mlx-lm, with one import changed.

python examples/mlx_lm_drop_in.py [MODEL]     any model that mlx_lm.load takes; the embedded one if left out
"""

import sys

from mlx_lm import load
from mlx_lm.sample_utils import make_sampler

from llmcad_mlx.mlx_lm_plugin.generation import stream_generate
from llmcad_mlx.store.names import DEFAULT_PRESET, resolve_target


def main() -> None:
    model, tokenizer = load(sys.argv[1] if len(sys.argv) > 1 else str(resolve_target(DEFAULT_PRESET)))
    question = "Repeat: the quick brown fox jumps over the lazy dog, the quick brown fox jumps over the lazy dog."
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    drafted = 0
    for response in stream_generate(model, tokenizer, prompt, max_tokens=48, sampler=make_sampler(temp=0.0)):
        print(response.text, end="", flush=True)
        drafted += response.from_draft
    rate = f"{response.generation_tps:.1f} tokens/s"
    print(f"\n{response.generation_tokens} tokens at {rate}, {drafted} of them drafted")


if __name__ == "__main__":
    main()
