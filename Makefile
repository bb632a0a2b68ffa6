# From a clone to green: make test. Needs Python 3.11 (or PYTHON=python3.12) and a C++ compiler.
PYTHON ?= python3.11
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: venv lint format test unit recipe distributed gpu quickstart clean
.DEFAULT_GOAL := test
# The tiers run one after the other even under make -j, because each one uses every core.
.NOTPARALLEL:

venv: $(STAMP)

# torch first: DeepSpeed's source build imports it, hence also --no-build-isolation.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja
	$(PIP) torch
	$(PIP) --no-build-isolation -e '.[test,dev,trl,deepspeed]'
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint unit recipe distributed

unit: $(STAMP)
	$(PY) -m pytest -n $(JOBS) --dist worksteal --durations=10 $(PYTEST_ARGS)

# A tier whose marker no test carries yet is skipped aloud. A tier that has tests must collect and pass them.
recipe distributed gpu: $(STAMP)
	@if grep -rqs --include='*.py' 'mark\.$@' tests; then \
		echo "$(PY) -m pytest -m $@ --durations=5 $(PYTEST_ARGS)"; \
		$(PY) -m pytest -m $@ --durations=5 $(PYTEST_ARGS); \
	else \
		echo "no test is marked '$@' yet: tier skipped"; \
	fi

# What a user installs, and nothing more; then the tour.
$(VENV)/.quickstart: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

quickstart: $(VENV)/.quickstart
	HF_HUB_OFFLINE=1 $(BIN)/molora quickstart

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
