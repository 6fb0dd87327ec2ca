# Two commands: `make demo` adapts a small speech encoder, `make test` runs the tests. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported; compiling all files of all packages would take as long as installing them.
PIP := python -m pip install --quiet --disable-pip-version-check --no-compile
INSTALL := $(BIN)/$(PIP) --constraint constraints.txt

.PHONY: demo test gate test-lowest test-newest lint types docs dist clean

demo: .venv/ready-demo
	$(BIN)/python examples/spoken_commands.py

# Neighbours in a file stay in one process, which prepares once what they share.
PYTEST := python -m pytest -n auto --dist worksteal
# Every promise once, in minutes. tests/conftest.py says which tests are left to the gate.
QUICK := -m "not gate and not exhaustive"

test: .venv/ready-dev
	$(BIN)/$(PYTEST) $(QUICK)

gate: test
	$(BIN)/$(PYTEST) -m gate

# What all else is built on, with the lowest PEFT and Transformers that pyproject.toml allows, and with what
# `pip install` gives today.
CORE := adapters config depth families feature_cache forward golden gradients life_cycle loading many_adapters \
	mixed_batches no_trace registry seams transformers_door window

test-lowest: .venv-lowest/ready
	.venv-lowest/bin/$(PYTEST) $(QUICK) $(CORE:%=tests/test_%.py) tests/conformance

test-newest: .venv-newest/ready
	.venv-newest/bin/$(PYTEST) $(QUICK) $(CORE:%=tests/test_%.py) tests/conformance

lint: .venv/ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/ready-dev
	$(BIN)/pyright

docs: .venv/ready-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/ready-python
	$(INSTALL) build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf .venv .venv-lowest .venv-newest site

.venv-lowest/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lowest
	grep -Ev '^(peft|transformers|tokenizers|huggingface-hub)==' constraints.txt > .venv-lowest/constraints.txt
	.venv-lowest/bin/$(PIP) -c .venv-lowest/constraints.txt torch
	.venv-lowest/bin/$(PIP) -c .venv-lowest/constraints.txt \
		peft==0.21.0 transformers==5.0.0 --editable '.[test]'
	touch $@

.venv-newest/ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/$(PIP) --editable '.[test]'
	touch $@

.venv/ready-python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "peft_elp needs Python 3.10 or newer, this is %s. Name one: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	touch $@

.venv/ready-torch: constraints.txt .venv/ready-python
	@echo "Installing PyTorch and what is built on it into .venv; this takes a few minutes the first time."
	$(INSTALL) torch
	touch $@

.venv/ready-demo: pyproject.toml .venv/ready-torch
	$(INSTALL) --editable '.[examples,train]'
	touch $@

.venv/ready-dev: pyproject.toml .venv/ready-torch
	$(INSTALL) --editable '.[dev]'
	touch $@
