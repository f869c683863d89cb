"""mlx-lm's `stream_generate` and `generate` with token trees, for models that `mlx_lm.load` has loaded.

    from llmcad_mlx.mlx_lm_plugin import load, stream_generate   # instead of: from mlx_lm import ...

Same signatures, same responses, same text. Without a draft model, what the text repeats is drafted (prompt
lookup). `python -m llmcad_mlx.mlx_lm_plugin generate|chat|server …` runs mlx-lm's own commands that way, and
`with installed():` does it for any code that calls mlx-lm.

`load`, and loading in these two ways, reads config.json as the model's publisher does where mlx-lm takes defaults
instead; a model that mlx-lm alone has loaded is refused where that makes another text. Of a draft model, and of
one whose tokenizer does not name its folder, nothing is known: it runs as it is.

What mlx-lm's options do here:
- `sampler`, `logits_processors`: called as by mlx-lm, once for each token, in order, on the target's row; so with
  the same `mx.random.seed` a finished generation has mlx-lm's text (of generation without a draft model).
- `draft_model`: drafts the tree. `num_draft_tokens`: most drafted tokens that a pass verifies; left out, the
  policy chooses.
- `prompt_cache`: read before, and written back before the last response and whenever the generator is closed: it
  then holds what was generated, the last token included. With a draft model its second part is the draft's.
- `prefill_step_size`, `prompt_progress_callback`, `stream`: as in mlx-lm, draft model or not.
- `kv_bits`, `input_embeddings`, `max_kv_size` where the text could outgrow it, caches of other kinds than
  mlx-lm's `KVCache`, and models that cannot verify a draft: mlx-lm's own function runs instead, drafting as it
  does. The logger `llmcad_mlx.mlx_lm_plugin` tells why, at level INFO.
"""

from __future__ import annotations

from importlib import metadata

from packaging.specifiers import SpecifierSet

_TESTED = ">=0.32.2,<0.33"  # mlx-lm's internals move between minor versions
_FOUND = metadata.version("mlx-lm")

if not SpecifierSet(_TESTED).contains(_FOUND, prereleases=True):
    raise ImportError(
        f"llmcad_mlx.mlx_lm_plugin is tested with mlx-lm {_TESTED}, not {_FOUND}; "
        f"run: pip install 'mlx-lm{_TESTED}'"
    )

from llmcad_mlx.mlx_lm_plugin.generation import generate, installed, stream_generate  # noqa: E402
from llmcad_mlx.mlx_lm_plugin.loading import load  # noqa: E402

__all__ = ["generate", "installed", "load", "stream_generate"]
