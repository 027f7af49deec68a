# Everything a developer runs. It needs python3 (3.11 or newer) and, for compiled kernels, g++.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-dev
DOCS_INSTALLED := $(VENV)/.installed-docs
INPUTS := pyproject.toml constraints.txt

# $(call install,EXTRA): pip's chatter goes to a log; the screen gets one line per package.
define install
	echo "Installing neurms[$(1)]: some minutes the first time, seconds after that"
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e ".[$(1)]" 2>&1 | tee $(VENV)/install.log \
	    | awk '/^Collecting/ {printf "  %s\n", $$2; fflush()} /^Installing collected/ {print "  unpacking"; fflush()}' \
	|| { tail -n 8 $(VENV)/install.log; \
	     echo "error: the installation failed; its log is $(VENV)/install.log."; \
	     echo "Without a network, set PIP_INDEX_URL or PIP_FIND_LINKS to a local index, then run make again."; \
	     exit 1; } >&2
endef

.PHONY: help install demo test coverage test-slow test-all lint format docs pages dist check-dist bench-quick bench-wheel clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## create .venv and install neurms with its tools (the others do it too)

demo: $(INSTALLED)  ## train eight optimizers on a tiny language model and compare them
	@$(BIN)/neurms demo

test: $(INSTALLED)  ## the fast tests, doctests and documentation examples
	@$(BIN)/python -c "import neurms; neurms.warm_up()"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -q

coverage: $(INSTALLED)  ## the same tests, with the share of lines that they run; fails below a threshold
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" -q --cov --cov-report=term

test-slow: $(INSTALLED)  ## the slow tests alone
	@$(BIN)/python -c "import neurms; neurms.warm_up()"
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m slow -q tests

test-all: test test-slow  ## every test: the fast ones, then the slow ones

lint: $(INSTALLED)  ## ruff, mypy and the contracts between the floors
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## rewrite the sources in the house style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(DOCS_INSTALLED)  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pages: $(INSTALLED)  ## rewrite the pages that are made from the sources
	@$(BIN)/python -m benchmarks.tables
	@$(BIN)/python -m tools.troubleshooting

# The second build is the one for this machine's platform, with the kernels inside; CXX may be a cross compiler.
dist: $(INSTALLED)  ## build the wheels and the sdist into dist/
	@rm -rf dist
	@$(BIN)/python -m hatchling build -d dist
	@NEURMS_WHEEL=native $(BIN)/python -m hatchling build -t wheel -d dist

# PYTHONS="python3.11 python3.13" tries the installation with each of them.
check-dist: dist  ## build them, build again, and try the wheels outside of the checkout
	@$(BIN)/python -m tools.check_dist
	@$(BIN)/python -m tools.check_native dist/*linux*.whl
	@$(BIN)/python -m tools.check_again dist
	@$(BIN)/python -m tools.check_install dist/*linux*.whl $(PYTHONS)

bench-quick: $(INSTALLED)  ## the shortest benchmark, a minute or two
	@$(BIN)/neurms bench quick

# About five minutes on a quiet machine. torch's own optimizers are in it: what they differ by is noise.
bench-wheel: dist  ## the wheel's kernels against those compiled for this processor, turn by turn
	@rm -rf build/wheel
	@$(BIN)/python -m zipfile -e dist/*linux*.whl build/wheel
	@cp -r benchmarks build/wheel
	@for what in kernels step; do for threads in 1 2; do \
	    PYTHONPATH=. $(BIN)/python -m benchmarks.before_after --before . --after build/wheel --what $$what \
	        --threads $$threads --rounds 15 --out build/wheel_$${what}_$$threads.json; done; done

clean:  ## remove caches and build outputs, keep .venv
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache \
	    .coverage htmlcov lightning_logs
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	@rm -rf $(VENV)

$(BIN)/python:
	@command -v "$(PYTHON)" >/dev/null \
	|| { echo "error: $(PYTHON) was not found; install Python 3.11 or newer, or run make PYTHON=/path/to/python3." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "error: neurms needs Python 3.11 or newer, and $(PYTHON) is $$("$(PYTHON)" -V 2>&1); run make PYTHON=python3.11." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null \
	|| { echo "error: $(PYTHON) lacks the venv module; on Debian or Ubuntu: apt install python3-venv." >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" -V 2>&1)"
	@"$(PYTHON)" -m venv --clear $(VENV)

$(INSTALLED): $(INPUTS) | $(BIN)/python
	@$(call install,dev)
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	@$(call install,docs)
	@touch $@
