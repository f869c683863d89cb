"""Making a draft for a target from text that the target writes itself: `python -m distill`, see README.md."""

import llmcad_mlx  # noqa: F401 - before mlx-lm, see llmcad_mlx.process
