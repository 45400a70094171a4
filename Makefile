# `make train` and `make test` do all the set-up on a machine that has Python 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A process for each core, each with one thread.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: train test test-all attack audit lint types setup dashboard clean

train: setup
	$(BIN)/python -m nvf.train $(ARGS)

# Every promise once, in minutes, but those that take longest to see.
test: lint types $(VENV)/.installed-text
	$(PYTEST) -m 'not slow and not browser' $(ARGS)

# With repeats at length, and in a browser where there is one.
test-all: lint types $(VENV)/.installed-text
	$(PYTEST) $(ARGS)

# The attacks, with all their attempts.
attack: $(VENV)/.installed-text
	NVF_ATTACK=full $(PYTEST) tests/attacks $(ARGS)

# In an environment of its own. Strict: a version that the service does not know is an error, not a clean bill, as it is
# with a mirror of PyPI that has no advisories; ARGS="-s osv" asks another service.
audit:
	test -x .audit/bin/python || $(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.10'
	.audit/bin/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

dashboard: setup
	$(BIN)/tensorboard --logdir outputs

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v[0]}.{v[1]} is not supported; name another one: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV), a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) '.[dev]'
	touch $@

# Apart, so that training, which needs no language model, neither installs one nor starts slower for it.
$(VENV)/.installed-text: $(VENV)/.installed
	$(INSTALL) '.[dev,text]'
	touch $@

clean:
	rm -rf $(VENV)
