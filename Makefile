# Two commands for users: `make run` and `make test`. Each sets up .venv first when that has not been done.
# Options of the job go through ARGS:  make run ARGS="--model DIR --dataset FILE --limit 100"

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SETUP_FILES := pyproject.toml constraints.txt
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help run test lint format types clean

help:
	@echo 'make run     set up, then run the main job   (ARGS="..." goes to isologit run)'
	@echo 'make test    set up, then run the tests      (PYTEST_ARGS="..." goes to pytest)'
	@echo 'make lint    style and formatting, nothing is changed'
	@echo 'make format  let ruff rewrite what it can'
	@echo 'make types   mypy --strict'
	@echo 'make clean   remove .venv and caches; results under runs/ stay'

run: $(INSTALLED)
	@$(BIN)/isologit run $(ARGS)

test: $(INSTALLED_DEV)
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED_DEV)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: $(INSTALLED_DEV)
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A stamp is written last, so an interrupted set-up is simply done again.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'make: $(PYTHON) was not found; install Python 3.11 or newer, or give one: make run PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); isologit needs Python 3.11 or newer: make run PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo 'Setting up $(VENV) (once; it downloads PyTorch, so it can take some minutes) ...'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo 'make: the virtual environment could not be made; on Debian and Ubuntu install the package python3-venv' >&2; exit 1; }

$(INSTALLED): $(SETUP_FILES) | $(BIN)/python
	@$(PIP_INSTALL) -e .
	@touch $@

$(INSTALLED_DEV): $(SETUP_FILES) | $(BIN)/python
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(INSTALLED) $@
