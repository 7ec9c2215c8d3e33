# Two commands: `make demo` and `make test`. Each sets up its own environment (.venv) when there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint install
.DEFAULT_GOAL := test

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'Bitquake needs Python 3.10 or newer, got ' + sys.version.split()[0] + '; set PYTHON=python3.x')"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing (lmms-eval brings torch and its CUDA libraries: about 7 GB, a few minutes) ..."
	$(BIN)/python -m pip install --quiet --editable ".[eval,dev]"
	@touch $@

demo: install
	$(BIN)/bitquake demo --out demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest
