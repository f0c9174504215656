# make setup     the environment .venv with everything (again only after a change of setup.cfg or pyproject.toml)
# make demo      redoes the paper in small on synthetic speech, and its tables: 15 to 25 minutes on two cores
# make test      all tests but the slow ones, with the examples in the docstrings
# make test-all  these, then the slow ones
# make lint      style and format
# make clean     deletes what building and testing left, not .venv

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test test-all lint clean

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	        { echo "$(PYTHON) is not Python 3.10 or newer: name one that is, as in make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -m venv .venv; \
	fi
	@echo "installing into .venv (torch is several gigabytes: minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,test]'
	@touch $@

demo: setup
	$(BIN)/sb-bestrq demo

test: setup
	$(BIN)/python -m pytest -m "not slow"

test-all: test
	$(BIN)/python -m pytest -m slow

lint: setup
	$(BIN)/python -m ruff check --no-cache .
	$(BIN)/python -m ruff format --no-cache --check .

clean:
	rm -rf build dist .hypothesis .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
