# Two commands: `make demo` and `make test`; for the leaderboard `make board-check` and `make board`. Each sets up its own
# environment (.venv) when there is none; the last two need no torch.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

SUBMISSIONS ?= leaderboard/submissions
BOARDS ?= reliable_vqa block
# Boards whose reference answers are made here, from data in the package.
OFFLINE ?= block
GOLD ?= .gold
BASE ?=
# Test processes side by side; each loads torch (1 GB), and computes on one thread.
JOBS ?= 2

.PHONY: demo test lint install board board-check
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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

$(BIN)/bitquake:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[board]"

$(GOLD)/%/built: leaderboard/boards/%.yaml | $(BIN)/bitquake
	$(BIN)/bitquake leaderboard gold --board $* --out $(GOLD)
	@touch $@

# BASE=COMMIT also checks that nothing which that commit holds was changed or removed.
board-check: $(OFFLINE:%=$(GOLD)/%/built)
	$(BIN)/bitquake leaderboard validate --all --submissions $(SUBMISSIONS) --gold $(GOLD) $(if $(BASE),--base $(BASE))

board: $(OFFLINE:%=$(GOLD)/%/built)
	@mkdir -p $(SUBMISSIONS)
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} $(BIN)/bitquake leaderboard build \
	  $(BOARDS:%=--board %) --submissions $(SUBMISSIONS) --gold $(GOLD) --out board
