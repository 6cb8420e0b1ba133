# make demo: set up, run the main job on the embedded miniature world, print where the result is.
# make test: set up, pass the checks and the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup setup-dev demo docs test test-unit test-cluster checks soak benchmarks clean

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(VENV)/.installed $@

demo: setup
	$(BIN)/midpo run miniature

# docs/configuration.md, from the descriptions of the keys.
docs: setup
	$(BIN)/midpo config --markdown > docs/configuration.md

checks: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-unit: setup-dev
	$(BIN)/python -m pytest -q -m "not slow and not cluster"

# Hosts in network namespaces: needs root and the packages iproute2, openssh-server, openssh-client, rsync; skipped by name otherwise.
test-cluster: setup-dev
	$(BIN)/python -m pytest -q -rs tests/cluster

# 20 kills at random times in one run of the miniature on the same hosts; a quarter of an hour.
soak: setup-dev
	$(BIN)/python tests/cluster/soak.py

# Two files at a time, because a test on Ray mostly waits.
test: checks
	$(BIN)/python -m pytest -q -rs -m "not faults" -n 2 --dist loadfile --no-loadscope-reorder --durations 30

# make benchmarks MODEL=DIR SAFETY=FILE HELPFUL=FILE [QUICK=--quick]: on a quiet machine; fills benchmarks/results/.
MODEL ?= runs/SmolLM2-135M-Instruct
SHARED := $(or $(MIDPO_SHARED),../shared)
SAFETY ?= $(SHARED)/data/pku_safety_pairs.jsonl
HELPFUL ?= $(SHARED)/data/helpful_pairs.jsonl
STEP := $(BIN)/python -m benchmarks.preference_step --model $(MODEL) --data $(SAFETY) $(if $(QUICK),--pairs 16)
benchmarks: setup-dev
	$(STEP) --dtype fp32
	$(STEP) --dtype bf16
	$(BIN)/python -m benchmarks.scoring --model $(MODEL) --data $(SAFETY) $(QUICK)
	$(BIN)/python -m benchmarks.router_decode --model $(MODEL) $(QUICK)
	$(BIN)/python -m benchmarks.pipeline --model $(MODEL) --safety $(SAFETY) --helpful $(HELPFUL) $(QUICK)
	$(BIN)/python -m benchmarks.scaling --model $(MODEL) $(QUICK)
	$(BIN)/python -m benchmarks.floor --model $(MODEL) --data $(SAFETY) $(QUICK)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
