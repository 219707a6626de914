# The environment, the demo and the checks. Nothing but Python 3.11 or newer is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-long gpu-check lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev,vae,dali]'
	touch $@

demo: setup
	$(BIN)/miro demo

# Three lanes, each a process: Triton interprets or compiles, and that is settled at its import.
test: setup lint
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/kernels/interpret
	$(BIN)/python -m pytest tests/kernels/compiled

# What takes minutes: every stage, world and accumulation, twenty kills, all changes of the world.
test-long: setup
	$(BIN)/python -m pytest -m long

# Proves and times the kernels on a GPU; exits 2 on a machine without one.
gpu-check: setup
	$(BIN)/python profiling/gpu_check.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) runs build *.egg-info
