"""A client for an iPad: the model runs on a Mac, the program on the iPad. Needs Python and llmcad-mlx, no MLX.

On the Mac: llmcad-mlx serve --host 0.0.0.0 --api-key SOMETHING-SECRET
On the iPad: python ipad_client.py http://mac.local:8080 "Why is the sky blue?"
with the key in the environment's LLMCAD_MLX_API_KEY. Without arguments it asks a server on this machine.
"""

import sys

from llmcad_mlx import LlmcadError, load


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
    question = sys.argv[2] if len(sys.argv) > 2 else "Name three things that float on water."
    with load(address) as engine:
        stats = None
        for response in engine.stream_generate([{"role": "user", "content": question}], max_tokens=80):
            print(response.text, end="", flush=True)
            stats = response.stats
    if stats is not None:
        print(f"\n{stats.generated_tokens} tokens in {stats.target_passes} passes of the target, far away")


if __name__ == "__main__":
    try:
        main()
    except LlmcadError as error:
        sys.exit(str(error))
