# The only commands a newcomer needs: make demo, make test, make check.
# Another Python: make demo PYTHON=python3.13. Another place: make demo VENV=/somewhere/env.

PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check format clean

help:
	@echo 'make demo    train eight mechanisms on Shakespeare, compare them, write $(OUT)/report.html (on 2 cores about 6 minutes, with AVX2 alone 10)'
	@echo 'make test    run all tests (on 2 cores about 17 minutes, longer with AVX2 alone)'
	@echo 'make check   lint, types, tests'
	@echo 'make format  apply the linter and formatter'
	@echo 'make clean   remove the virtual environment; results are kept'

demo: $(VENV)/.demo-installed
	@$(BIN)/attnlab demo --out $(OUT)

test: $(VENV)/.test-installed browser
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(VENV)/.test-installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory test

format: $(VENV)/.test-installed
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "attnlab needs Python 3.11 or newer, and '$(PYTHON)' is not that: name one with 'make $(MAKECMDGOALS) PYTHON=python3.12'." >&2; exit 2; }
	@echo 'Making a virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "'$(PYTHON) -m venv' does not work here: install Python's venv module (on Debian and Ubuntu: apt-get install python3-venv) and repeat." >&2; exit 2; }
	@touch $@

$(VENV)/.torch-installed: $(VENV)/.made constraints.txt
	@echo "Installing $$(grep '^torch==' constraints.txt) (the largest part, once)"
	@$(PIP) torch
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.torch-installed pyproject.toml
	@echo 'Installing attnlab with what training and the report need'
	@$(PIP) --editable '.[train,report]'
	@touch $@

$(VENV)/.test-installed: $(VENV)/.torch-installed pyproject.toml
	@echo 'Installing attnlab with what the tests need'
	@$(PIP) --editable '.[all]'
	@touch $@ $(VENV)/.demo-installed

# The report is tested in a real browser. Debian's is installed where we may; elsewhere those tests say that they were skipped.
.PHONY: browser
browser:
	@if ! command -v chromium chromium-browser google-chrome >/dev/null; then \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    echo 'Installing chromium, in which the report is tested'; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	      echo 'WARNING: chromium could not be installed; the browser tests of the report will not run.' >&2; \
	  else \
	    echo 'WARNING: no chromium here and no right to install it; the browser tests of the report will not run.' >&2; \
	  fi; \
	fi
