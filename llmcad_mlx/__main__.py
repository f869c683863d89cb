"""`python -m llmcad_mlx`: the command `llmcad-mlx`."""

from __future__ import annotations

from llmcad_mlx.cli.main import main

if __name__ == "__main__":
    main()
