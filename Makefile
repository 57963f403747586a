# Headrace. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install curate train test check lock clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: .venv/installed  ## make .venv and install the pinned dependencies into it

.venv/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: Headrace needs Python 3.11 or later\nhint: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirements requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

curate: install  ## curate the mini-web: about 3,000 URLs over real HTTP, into data/
	$(BIN)/curate run miniweb

train: install  ## curate 30,000 scenes, then train the three models on them, draw and evaluate, into runs/miniweb
	$(BIN)/curate run miniweb-train --data data/miniweb-train
	$(BIN)/trainer fit --shards data/miniweb-train/curated --config mini --set decoder.drop_text=0.1 --out runs/miniweb \
		$(if $(wildcard runs/miniweb/config.toml),--resume)
	$(BIN)/trainer sample --run runs/miniweb "a large red star to the left of a small blue ring on a white background" \
		"a green heart above a yellow square" "a small purple cross below a large orange circle"
	$(BIN)/trainer eval --run runs/miniweb

test: install  ## run the tests, offline
	$(BIN)/python -m pytest

check: install  ## lint, types and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py

lock:  ## renew requirements.lock: exact versions and hashes, no addresses
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--group dev --custom-compile-command "make lock" --upgrade pyproject.toml -o requirements.lock

clean:  ## remove what `make curate` and `make train` made, and the caches; not .venv, nor other folders in data/
	cd data 2>/dev/null && rm -rf urls raw signals decisions curated report miniweb miniweb-train recipe.toml \
		.markers .retry .limits .lock || true
	rm -rf runs/miniweb .mypy_cache .ruff_cache .pytest_cache
