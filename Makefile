# Every target works alone on a fresh clone: what it needs is installed into .venv first.
#
#   make demo ARGS="--help"     PYTHON=python3.12 make test
#
# On a machine without a GPU, install the CPU build of torch (a tenth of the size) with pip's own setting:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
BENCH ?= epoch growth denoiser rewards reentry memory

# One thread per process: the suite runs in two processes, and tiny tensors gain nothing from more.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: setup demo test test-all lint bench docs wheel clean

setup: $(STAMP)

# The version is read from __init__.py, so a change there renews the installed metadata too.
$(STAMP): pyproject.toml constraints.txt src/dpok_trl/__init__.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/dpok-trl demo $(ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict src/dpok_trl/core
	$(BIN)/python tools/check_release.py

# make bench BENCH=reentry ARGS="--sd15"
bench: $(STAMP)
	for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

docs: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# the package as a user gets it: built, and tried in an environment of its own
wheel:
	PYTHON=$(PYTHON) .ci/wheel

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
