# `make` lists the targets. Everything is installed into .venv by plain pip, at the versions of constraints.txt.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lint types imports tests format docs site clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' Makefile | sed 's/:[^#]*## /	/' | expand -t 12

demo: $(VENV)/.train ## install what the demo needs, then watch a model grow from 1 to 4 stacks
	$(BIN)/stackwise demo

test: $(VENV)/.dev ## install the test tools, then run lint, types, import rules and all tests
	@$(MAKE) --no-print-directory --keep-going lint types imports tests

lint: $(VENV)/.dev ## style: ruff check and ruff format --check
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## types: mypy on all of src/
	$(BIN)/mypy

imports: $(VENV)/.dev ## import rules between the rooms: import-linter
	$(BIN)/lint-imports

tests: $(VENV)/.dev ## all tests: pytest, JOBS files at a time (2), each on one thread
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

format: $(VENV)/.dev ## format the code and repair what ruff can repair
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: $(VENV)/.train ## write the generated parts of docs/ again
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/draw.py

site: $(VENV)/.docs ## build the pages as a site: site/index.html
	$(BIN)/python -m sphinx -W --keep-going -q -b html -c docs . site
	@echo "open site/index.html"

clean: ## remove .venv, caches and build files; runs/ stays
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: made again when the packages or their versions change. torch comes first and by itself, so that
# nothing that follows can bring another one.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "stackwise needs Python 3.11 or \
	later, but $(PYTHON) is: $$($(PYTHON) --version 2>&1). Name another one: make $(MAKECMDGOALS) \
	PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.made
	$(PIP) install $(TORCH) -c constraints.txt
	@touch $@

$(VENV)/.train: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -e ".[train]" -c constraints.txt
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -e ".[train,docs]" -c constraints.txt
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) install -e ".[dev]" -c constraints.txt
	@touch $@
