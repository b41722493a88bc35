# make demo | test | test-slow | lint | docs | bench. Each builds .venv on its first call and is quick afterwards.
#   make test PYTHON=python3.12         another interpreter
#   make test TESTS="tests/ops -k mask" some of the tests

VENV ?= .venv
TESTS ?= tests
SLOW ?= slow
TEST_WORKERS ?= 2
DEMO_OUTPUT ?= output/demo
VERSION_FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$p -c '$(VERSION_FITS)' >/dev/null 2>&1; then echo $$p; break; fi; done)
BIN := $(VENV)/bin

# pip tells what it downloads, and is silent for minutes while it unpacks: a line every few seconds says that it works.
define install
@trap 'kill $$ticks 2>/dev/null' EXIT; trap 'exit 130' INT TERM; \
	(seconds=0; while sleep 4; do seconds=$$((seconds + 4)); echo "  installing, $$seconds s"; done) & ticks=$$!; \
	echo "pip install --editable $(1)"; \
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --constraint constraints.txt \
		--editable $(1)
endef

.PHONY: help demo test test-slow lint docs bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    install, train on generated pictures, print box and mask AP (a few minutes)"
	@echo "make test    install with the development tools and run the quick tests"
	@echo "make test-slow  run the others, which take most of the time"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation with the API reference into site/"
	@echo "make bench   time a training step, part by part"
	@echo "make clean   remove $(VENV) and files of the tools"

$(BIN)/python:
	@if ! $(or $(PYTHON),false) -c '$(VERSION_FITS)' >/dev/null 2>&1; then \
		echo "error: this needs Python 3.10 to 3.13, and '$(or $(PYTHON),python3)' is not one;" \
			"say which to use: make PYTHON=/path/to/python3" >&2; exit 1; fi
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(call install,'.[dev]')
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/gn-detect train --config-file configs/quick/demo.yaml OUTPUT_DIR $(DEMO_OUTPUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not slow" $(TESTS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "$(SLOW)" $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed
	$(BIN)/python tools/benchmark.py train

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage .hypothesis
