# `make` alone lists the targets. Choose the interpreter with `make PYTHON=python3.12 ...`.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help rlhf study test lint clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /#/' | awk -F'#' '{printf "  make %-7s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev,peft,plots]"
	@touch $@

rlhf: $(READY)  ## the main job: tune reward weights around a trl follower; run it again to continue, finished stages are kept
	$(BIN)/align-cbrl run docstrings --out runs/docstrings --resume

study: $(READY)  ## the main job and its baselines over five seeds
	$(BIN)/python -m recipes.docstrings.study

test: lint  ## linter, type checker, and all tests but the slow ones
	$(BIN)/python -m pytest -m "not slow"

lint: $(READY)  ## linter, format and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove caches and build outputs; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find align_cbrl toy_cmdp recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
