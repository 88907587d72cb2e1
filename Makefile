# Everything runs in .venv, which the first target to need it creates; nothing has to be activated.
# Versions are those of constraints.txt.  `make PYTHON=python3.12 test` takes another interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-plain faults fuzz lint format type docs bench clean

# The fit takes its threads from the machine: one thread is for tests of small networks.
demo: $(VENV)/.core
	env -u OMP_NUM_THREADS $(BIN)/pyrodiff fit digits --output runs/digits --resume

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2

# Every fault at every file operation; some hours on one core.
faults: $(VENV)/.test
	$(BIN)/python tests/faults.py --output benchmarks/results/faults.json

# The tests of numbers in the arithmetic of a plain processor, without its vector instructions.
test-plain: $(VENV)/.test
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -n 2 -m numeric

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

type: $(VENV)/.dev
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "The site is in build/site: $(BIN)/python -m http.server -d build/site"

bench: $(VENV)/.test
	$(BIN)/python benchmarks/steps.py

fuzz: $(VENV)/.test
	nice $(BIN)/python benchmarks/fuzz.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# One stamp per set of packages, so that setting up happens once.

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: constraints.txt | $(VENV)/.python
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.core: $(PROJECT) $(VENV)/.torch
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(PROJECT) $(VENV)/.core
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/.dev: $(PROJECT) $(VENV)/.core
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.docs: $(PROJECT) $(VENV)/.core
	$(PIP) -e ".[docs]"
	touch $@
