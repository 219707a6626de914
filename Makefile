# The environment, the demo and the checks. Nothing but Python 3.11 or newer is needed beforehand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ORACLES := .oracles

.PHONY: setup demo test test-long reward-oracles gpu-check lint docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt \
		--editable '.[dev,docs,demo,profiling,vae,dali]'
	touch $@

demo: setup
	PYTHONPATH=examples $(BIN)/python -m openmoji demo

# Three lanes, in separate processes: Triton interprets or compiles, which its import decides. The
# files of a lane are divided among the cores.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
test: setup lint
	$(BIN)/python -m pytest $(PARALLEL)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/kernels/interpret
	$(BIN)/python -m pytest $(PARALLEL) tests/kernels/compiled

# What takes minutes: every stage, world and accumulation, twenty kills, all changes of the world.
test-long: setup
	$(BIN)/python -m pytest -m long

# What the published reward packages score, in an environment of their own: see tests/oracles.
reward-oracles: $(ORACLES)/.installed
	set -e; for script in tests/oracles/*_scores.py; do \
		$(ORACLES)/bin/python -W ignore $$script \
			tests/miro/fixtures/$$(basename $$script .py).json; \
	done

$(ORACLES)/.installed: tests/oracles/requirements.txt tests/oracles/no-deps.txt
	$(PYTHON) -m venv $(ORACLES)
	$(ORACLES)/bin/pip install --quiet --requirement tests/oracles/requirements.txt
	$(ORACLES)/bin/pip install --quiet --no-deps --requirement tests/oracles/no-deps.txt
	# The wheel of hpsv2 lacks its vocabulary, which is open_clip's.
	cp $(ORACLES)/lib/python3*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz \
		$(ORACLES)/lib/python3*/site-packages/hpsv2/src/open_clip/
	touch $@

# Proves and times the kernels on a GPU, decoding and rewards; exits 2 on a machine without one.
gpu-check: setup
	$(BIN)/python profiling/gpu_check.py
	$(BIN)/python profiling/check_data.py
	$(BIN)/python profiling/bench_rewards.py --device cuda

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest --noconftest tests/test_architecture.py tests/test_language.py

# The API documentation in build/docs, from the docstrings; a warning is an error.
docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(ORACLES) runs build *.egg-info
