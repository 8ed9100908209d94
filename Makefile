# Verbs of one word. Everything lives in .venv; nothing outside this folder is changed but the model cache.
#
#   make serve   environment, install, the default model, server on http://127.0.0.1:8000
#   make test    environment, install, the whole test suite
#   make check   format, lint, types, layers, tests: what CI runs
#   make format  rewrite the code in the project's format
#   make tree    rewrite the file tree in README.md
#   make pages   rewrite the documents that are made from docstrings
#   make snapshot  record the device interface as it is now; refused where plugins would break
#   make clean   remove the environment and build products

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=
MODEL ?=

NATIVE := $(wildcard plugins/cpu/native/* plugins/cpu/native/kernels/*) plugins/cpu/CMakeLists.txt
MANIFESTS := core/pyproject.toml plugins/cpu/pyproject.toml plugins/simulated/pyproject.toml api/pyproject.toml cli/pyproject.toml constraints.txt
OUTSIDE := examples compatibility
SOURCES := core/src plugins/cpu/src plugins/simulated/src api/src cli/src
CODE := $(SOURCES) $(OUTSIDE) tests benchmarks tools

.PHONY: serve test check format lint types layers pytest tree pages snapshot clean

serve: $(VENV)/.installed
	$(BIN)/midspan serve $(MODEL) $(ARGS)

test: $(VENV)/.development pytest

check: $(VENV)/.development lint types layers pytest

lint:
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

types:
	$(BIN)/mypy $(SOURCES) $(OUTSIDE)

layers:
	$(BIN)/lint-imports

pytest:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

format: $(VENV)/.development
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

tree: $(VENV)/.development
	$(BIN)/python tools/file_tree.py --write

pages: $(VENV)/.development
	$(BIN)/python tools/interface_page.py --write

snapshot: $(VENV)/.development
	$(BIN)/python tools/interface_snapshot.py --write

$(VENV)/bin/python:
	@echo "==> Creating the environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python $(MANIFESTS) $(NATIVE)
	@echo "==> Installing Midspan and the cpu plugin (the first time takes a few minutes)"
	$(PIP) install -c constraints.txt -e core -e plugins/cpu -e plugins/simulated -e api -e cli
	@touch $@

$(VENV)/.development: $(VENV)/.installed pyproject.toml
	@echo "==> Installing the tools for tests and checks"
	$(PIP) install --quiet -c constraints.txt --group dev
	@touch $@

clean:
	rm -rf $(VENV) plugins/cpu/build build dist
