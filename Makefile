# Two commands: `make demo` adapts a small speech encoder, `make test` runs the tests. Each sets up what it needs in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-lowest lint types docs dist clean

demo: .venv/ready-demo
	$(BIN)/python examples/spoken_commands.py

test: .venv/ready-dev
	$(BIN)/python -m pytest -n auto

# The lowest PEFT and Transformers that pyproject.toml allows, on what all else is built on.
CORE := adapters config registry golden forward families life_cycle loading many_adapters mixed_batches depth feature_cache window

test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -n auto $(CORE:%=tests/test_%.py)

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
	rm -rf .venv .venv-lowest site

.venv-lowest/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-lowest
	grep -Ev '^(peft|transformers|tokenizers|huggingface-hub)==' constraints.txt > .venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt torch
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt \
		peft==0.21.0 transformers==5.0.0 --editable '.[test]'
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
	$(INSTALL) --editable '.[examples]'
	touch $@

.venv/ready-dev: pyproject.toml .venv/ready-torch
	$(INSTALL) --editable '.[dev]'
	touch $@
