# make demo | test | test-slow | lint | bench. Each builds .venv on its first call and is quick afterwards.
#   make test PYTHON=python3.12         another interpreter
#   make test TESTS="tests/ops -k mask" some of the tests

VENV ?= .venv
TESTS ?= tests
TEST_WORKERS ?= 2
DEMO_OUTPUT ?= output/demo
VERSION_FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$p -c '$(VERSION_FITS)' >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN := $(VENV)/bin

.PHONY: help demo test test-slow lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, train on generated pictures, print box and mask AP (a few minutes)"
	@echo "make test    install with the development tools and run the quick tests"
	@echo "make test-slow  run the others, which take most of the time"
	@echo "make lint    ruff and mypy"
	@echo "make bench   time a training step, part by part"
	@echo "make clean   remove $(VENV) and what tools left behind"

$(BIN)/python:
	@if ! $(or $(PYTHON),false) -c '$(VERSION_FITS)' >/dev/null 2>&1; then \
		echo "error: this needs Python 3.10 to 3.13, and '$(or $(PYTHON),python3)' is not one;" \
			"say which to use: make PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/gn-detect train --config-file configs/quick/demo.yaml OUTPUT_DIR $(DEMO_OUTPUT)
	@$(BIN)/python -c "import json; r = json.load(open('$(DEMO_OUTPUT)/results.json')); \
		print('box AP %.1f, mask AP %.1f' % (r['bbox']['AP'], r['segm']['AP']))"
	@echo "pictures of predictions: $(DEMO_OUTPUT)/pictures"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow" $(TESTS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m slow $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py train

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis
