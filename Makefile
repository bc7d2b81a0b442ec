# Two commands for a newcomer: `make quickstart` and `make test`.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
FAST := not slow and not gpu

.PHONY: help quickstart test test-all lint format types install install-dev clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart  install into $(VENV) and run the quickstart recipe (no GPU, no downloads of models)"
	@echo "make test        install the development tools too and run the tests"
	@echo "make test-all    every test, the long ones included"
	@echo "make lint types  what CI checks besides the tests"

quickstart: install
	$(BIN)/posttrain run quickstart

test: install-dev
	$(BIN)/python -m pytest -m "$(FAST)" $(PYTEST_ARGS)

test-all: install-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install-dev
	$(BIN)/mypy

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# A stamp of its own: an interrupted `python -m venv` leaves a python without pip behind.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "posttrain needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A stamp is younger than what it was installed from, so a second call does nothing. It is written only
# after pip succeeded; the console script proves that the package is really there.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing into $(VENV); torch is large, so the first time takes a minute or more"
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@test -x $(BIN)/posttrain
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/.created
	@echo "installing into $(VENV), with the development tools; the first time takes a minute or more"
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@test -x $(BIN)/posttrain
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache
