SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install test test-slow demo tables clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test]' --constraint constraints.txt
	touch $@

test: install
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q

test-slow: install
	$(BIN)/python -m pytest -q -m slow

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" bash runs/demo.sh

# The README's tables, from the measurements that stand in the repository.
tables: install
	$(BIN)/python runs/tables.py

# Keeps .venv and every run but the demo's.
clean:
	rm -rf out/demo build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
