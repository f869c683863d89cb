# `make demo` and `make test` set everything up by themselves; PYTHON names another interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where it counts which kernels compute. They run again as on a Mac: on MLX's own, in fp32 and in both 16-bit types;
# the embedded model in its own, fp16.
TEXT_TESTS := tests/engine/test_engine.py tests/streaming/test_streaming.py
KERNEL_TESTS := tests/test_lossless.py tests/mlx_lm_plugin/test_mlx_lm_plugin.py tests/drafting/test_drafters.py
EMBEDDED_TEST := tests/test_embedded.py::test_a_tree_in_16_bits_says_what_its_tokens_say_in_32
# Half of the time tests wait for servers, terminals and browsers. A file's tests stay together.
JOBS ?= -n 2 --dist loadfile

DEMO_PROMPT := "Write this text again, word for word: The tide comes in twice a day. Fishermen know its hours by \
heart, and their children learn them before they learn to read. When the moon is full, the water climbs up to the \
old wall, and the boats in the harbour ride high above the quay."

PAIR_PROMPT := "Write a Python function that merges two sorted lists, with type hints, then explain it in one sentence."

.PHONY: demo demo-pair test test-kernels test-large check format clean bench

# The main job: the target's weights are read from the disk on every pass, but for what is pinned.
demo: $(READY)
	$(BIN)/llmcad-mlx generate --stats --memory 800MB --pinned 30MB --max-tokens 120 $(DEMO_PROMPT)

# The same with a target of 1.1 GB and its draft in 1 GB; a download of 1.6 GB.
demo-pair: $(READY)
	$(BIN)/llmcad-mlx generate --stats --target qwen2.5-coder-1.5b --memory 1GB --max-tokens 120 $(PAIR_PROMPT)

test: $(READY)
	$(BIN)/python -m pytest $(JOBS) -m "not large"
	$(MAKE) test-kernels

# A minute and a half on two cores; the whole suite again would take ten.
test-kernels: export LLMCAD_MLX_KERNELS = mlx
test-kernels: $(READY)
	$(BIN)/python -m pytest $(JOBS) -m "not large and not embedded" $(KERNEL_TESTS) $(TEXT_TESTS)
	LLMCAD_MLX_TEST_WEIGHTS=bfloat16 $(BIN)/python -m pytest $(JOBS) $(TEXT_TESTS)
	LLMCAD_MLX_TEST_WEIGHTS=float16 $(BIN)/python -m pytest $(JOBS) $(TEXT_TESTS) $(EMBEDDED_TEST)

test-large: $(READY)
	$(BIN)/python -m pytest -m large -s

check: $(READY)
	$(BIN)/ruff format --check llmcad_mlx tests examples convert distill docs
	$(BIN)/ruff check llmcad_mlx tests examples convert distill docs
	$(BIN)/mypy
	$(MAKE) test

format: $(READY)
	$(BIN)/ruff check --fix llmcad_mlx tests examples convert distill docs
	$(BIN)/ruff format llmcad_mlx tests examples convert distill docs

bench: $(READY)
	$(BIN)/llmcad-mlx bench --out bench-out

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench-out
