# `make demo` and `make test` set everything up by themselves; PYTHON names another interpreter (3.11 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

DEMO_PROMPT := "Write this text again, word for word: The tide comes in twice a day. Fishermen know its hours by \
heart, and their children learn them before they learn to read. When the moon is full, the water climbs up to the \
old wall, and the boats in the harbour ride high above the quay."

.PHONY: demo test test-large check format clean bench

demo: $(READY)
	$(BIN)/llmcad-mlx generate --max-tokens 120 $(DEMO_PROMPT)

test: $(READY)
	$(BIN)/python -m pytest -m "not large"

test-large: $(READY)
	$(BIN)/python -m pytest -m large -s

check: $(READY)
	$(BIN)/ruff format --check llmcad_mlx tests examples convert
	$(BIN)/ruff check llmcad_mlx tests examples convert
	$(BIN)/mypy
	$(BIN)/python -m pytest -m "not large"

format: $(READY)
	$(BIN)/ruff check --fix llmcad_mlx tests examples convert
	$(BIN)/ruff format llmcad_mlx tests examples convert

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
