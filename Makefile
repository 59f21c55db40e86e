# Every target works on a fresh machine: it makes its own virtual environment in .venv first.
#   make demo        compress, evaluate and report on the bundled checkpoint
#   make test        the tests, a few minutes            make test-slow   those that take longer
#   make test-newest the core of the tests on the newest Python and JAX that are here
#   make lint        format, lint, types, spelling, import rules
#   make docs        the documentation, into docs/_build/html
#   make notebooks   notebooks/*.ipynb anew from notebooks/*.py, with their outputs
#   make fuzz        the readers of untrusted files, guided by coverage: SECONDS=600 for each of three
#   make kills       two hundred runs killed at random moments and resumed; half an hour or more
#   make bench       the benchmarks (pinned to one core; the better part of an hour)
#
# make PYTHON=python3.12 ...    another interpreter (for a new .venv)
# make TORCH=2.14.1 ...         another PyTorch; empty takes whatever pip finds

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCUMENTING := $(VENV)/.documenting
WORKERS ?= 2
PYTEST_ARGS ?=
SECONDS ?= 600

# The newest Python on the path or among pyenv's; empty where there is none beside the default.
PYENV_ROOT ?= $(HOME)/.pyenv
NEWEST ?= $(shell for python in python3.14 python3.13 python3.12 \
  $$(ls -d $(PYENV_ROOT)/versions/3.1[2-9].*/bin/python 2>/dev/null | sort -rV); do \
  $$python -c "" 2>/dev/null && echo $$python && break; done)
CORE := tests/solvers tests/factors tests/allocation tests/methods tests/model tests/checkpoint tests/test_project.py

# One thread for each of the tests' processes: more only spin, waiting for a core.
test test-slow: export OPENBLAS_NUM_THREADS = 1
test test-slow: export OMP_NUM_THREADS = 1
# Most of the tests' time goes into compiling, in every process anew.
test test-slow: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/.jax_cache
test test-slow: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
# Many small programs that run once are compiled in a hurry; those of `make test-slow` are compiled as users have it.
test: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
test: export JAX_TRACEBACK_IN_LOCATIONS_LIMIT = 0

.PHONY: demo test test-slow test-newest lint format docs notebooks fuzz bench kills clean

demo: $(INSTALLED)
	$(BIN)/jaxmoe demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

test-newest:
	@test -n "$(NEWEST)" || { echo "no Python newer than 3.11 is here: make test-newest NEWEST=python3.13" >&2; exit 1; }
	$(MAKE) test PYTHON=$(NEWEST) VENV=.venv-newest PYTEST_ARGS="$(CORE)"

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/codespell
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(DOCUMENTING)
	$(BIN)/sphinx-build -W --keep-going -q -j auto docs docs/_build/html

notebooks: $(DOCUMENTING)
	JAX_PLATFORMS=cpu $(BIN)/python scripts/notebooks.py

fuzz: export JAX_PLATFORMS = cpu
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[fuzz]"
	for target in safetensors config record; do \
	  $(BIN)/python scripts/fuzz/run.py $$target --seconds $(SECONDS) || exit 1; done

bench: $(INSTALLED)
	for name in svd closed_form conversion basis_learning base_once compressed_experts forward calibration training gptq codebooks decoding; do \
	  echo "== $$name"; $(BIN)/python scripts/benchmarks/$$name.py || exit 1; done

kills: $(INSTALLED)
	$(BIN)/python scripts/kills.py

clean:
	rm -rf $(VENV) .venv-newest .jax_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache docs/_build

# PyTorch goes first, alone: as a mere dependency pip may take a build of several gigabytes.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jaxmoe needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	  "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch$(if $(TORCH),==$(TORCH))"
	$(BIN)/python -m pip install --quiet --editable ".[dev,eval,torch]"
	touch $@

$(DOCUMENTING): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@
