"""`python -m llmcad_mlx.mlx_lm_plugin generate|chat|server …`: mlx-lm's own commands, with token trees."""

from __future__ import annotations

import logging
import signal
import sys
from importlib import import_module

from llmcad_mlx.errors import LlmcadError
from llmcad_mlx.process import prepare_process

_HELP = """usage: python -m llmcad_mlx.mlx_lm_plugin {generate,chat,server} [options]

Runs mlx-lm's own command of that name with token-tree drafting; the options are mlx-lm's (--help after the
command lists them). The server serves one request at a time: mlx-lm's batches have no trees. After each answer,
a line on stderr says how many tokens came in how many passes of the model."""


def main(words: list[str]) -> int:
    """Run one command; returns its exit code."""
    from llmcad_mlx.mlx_lm_plugin.generation import COMMANDS, installed

    if words[:1] in (["-h"], ["--help"]):
        print(_HELP)
        return 0
    if not words or words[0] not in COMMANDS:
        given = f"{words[0]!r} is none of" if words else "give one of"
        print(f"llmcad_mlx.mlx_lm_plugin: {given} the commands {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    # mlx-lm's commands show no acceptance: the plugin's own log does, whatever they do with logging.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("llmcad-mlx: %(message)s"))
    logger = logging.getLogger("llmcad_mlx.mlx_lm_plugin")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    prepare_process()
    sys.argv = [f"mlx_lm.{words[0]}", *words[1:]]
    try:
        with installed():
            import_module(f"mlx_lm.{words[0]}").main()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except LlmcadError as error:
        print(f"llmcad_mlx.mlx_lm_plugin: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
