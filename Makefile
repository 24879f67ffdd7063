# `make` alone lists the targets. Choose the interpreter with `make PYTHON=python3.12 ...`.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
DEV := .venv/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help rlhf study laboratory test lint docs clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:[^#]*## /#/' | awk -F'#' '{printf "  make %-10s %s\n", $$1, $$2}'

# Nothing is compiled beforehand: Python compiles what a run imports, a tenth of what is installed.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e ".[plots]"
	@touch $@

$(DEV): $(READY)
	$(PIP) -e ".[dev,peft,plots,tune]"
	@touch $@

rlhf: $(READY)  ## the main job, two minutes: tune reward weights around a trl follower; run again to continue, finished stages are kept
	$(BIN)/align-cbrl run tune_weights --out runs/tune_weights --resume

study: $(DEV)  ## the published study in the world of docstrings: five seeds with baselines, over an hour
	$(BIN)/align-cbrl run tune_weights --config study.yaml --out runs/study --resume

laboratory: $(DEV)  ## every tabular table and figure, the slow tests and benchmarks; about two hours, continues where it stopped
	$(BIN)/align-cbrl run four_rooms --config table.yaml --out runs/four_rooms-table --resume
	$(BIN)/align-cbrl run four_rooms --config sampled.yaml --out runs/four_rooms-sampled --resume
	$(BIN)/align-cbrl run tax_design --out runs/tax_design --resume
	$(BIN)/align-cbrl run tax_design --config neural.yaml --out runs/tax_design-neural --resume
	$(BIN)/align-cbrl run principal_agent --out runs/principal_agent --resume
	$(BIN)/align-cbrl run lqr --out runs/lqr --resume
	$(BIN)/align-cbrl run building --out runs/building --resume
	$(BIN)/align-cbrl run estimators --out runs/estimators --resume
	$(BIN)/align-cbrl run variety --out runs/variety --resume
	$(BIN)/align-cbrl run rtq --out runs/rtq --resume
	$(BIN)/align-cbrl run convergence --out runs/convergence --resume
	$(BIN)/align-cbrl validate
	for benchmark in exact_step sampled_step gridworld leader_memory; do $(BIN)/python -m align_cbrl.recipes.benchmarks.$$benchmark; done
	$(BIN)/python -m pytest -m slow

test: lint  ## linter, type checker, and all tests but the slow ones, a file at a time on every core
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

docs: $(READY)  ## the site with its API pages, in site/
	$(PIP) -e ".[docs]"
	$(BIN)/mkdocs build --strict

lint: $(DEV)  ## linter, format and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove caches and build outputs; keeps .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find align_cbrl toy_cmdp recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
