# demo and test set up what they need; neither reinstalls while pyproject.toml and
# constraints.txt stay as they are.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= reports/demo
PYTEST_ARGS ?=
BENCH_ARGS ?= --suite quick --out reports/bench

SOURCES := deqfusion kernels bench
# torch unpinned would be whatever is newest, and gigabytes of it: always the constraints file.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-library test-programs lint bench wheel clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo   train and evaluate on real data, write $(OUT)/index.html"
	@echo "make test   linter, formatter, type checker and tests"
	@echo "make bench  time equilibrium fusion against other implementations"
	@echo "make lint   linter, formatter and type checker only"
	@echo "make wheel  build dist/deqfusion-*.whl"
	@echo "make clean  remove what was built; make distclean: the environment too"

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	  echo "error: no '$(PYTHON)' found; deqfusion needs Python 3.11 or newer (make PYTHON=/path/to/python3)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: deqfusion needs Python 3.11 or newer, got $$($(PYTHON) --version 2>&1) (make PYTHON=/path/to/python3)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --no-build-isolation -e '.[dev,bench]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/deqfusion demo --out $(OUT)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

# Two processes, for two cores: the programs, interpreted and compiled for their targets, take about
# as long as everything else. Exit code 5: no test was selected (PYTEST_ARGS="-k ...") in one of them.
PROGRAMS := tests/kernels

test: lint
	@$(MAKE) --no-print-directory -j2 --output-sync=target test-library test-programs

test-library:
	$(BIN)/python -m pytest --ignore=$(PROGRAMS) $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-programs:
	$(BIN)/python -m pytest $(PROGRAMS) -p no:cacheprovider $(PYTEST_ARGS) || [ $$? -eq 5 ]

bench: $(VENV)/.installed-dev
	$(BIN)/deqfusion bench $(BENCH_ARGS)

wheel: $(VENV)/.installed-dev
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist reports *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
