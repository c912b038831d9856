# `make test` and `make quickstart` are all a newcomer needs; both set up .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Fixed, so that tests time and sum alike on any machine; a run of your own is not touched.
TEST_ENV := OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu
# The pinned pyright is the one to use: do not ask for a newer one.
PYRIGHT_ENV := PYRIGHT_PYTHON_IGNORE_WARNINGS=1

.PHONY: setup test check style quickstart bench clean

setup: $(READY)

$(READY): pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "no python3 found; install Python 3.11, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: set PYTHON=..." % v[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e '.[recipe,megatron,test]'
	@touch $@

test: check
	$(TEST_ENV) $(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(PYRIGHT_ENV) $(BIN)/pyright --pythonpath $(BIN)/python

style: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quickstart:
	@start=$$(date +%s); $(MAKE) --no-print-directory setup && \
		echo "setup: $$(( $$(date +%s) - start )) s"
	$(BIN)/python -m regate_ds.training.quickstart

bench: setup
	$(BIN)/regate bench

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
