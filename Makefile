# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed
# beforehand but Python 3.11+, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-quick lint format bench clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## virtual environment with vLLM (CPU) and the package

$(READY): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	@touch $@

demo: setup  ## compress the shipped adapters, serve them, ask them: end to end on this machine
	$(BIN)/vllm-jd demo

test: setup lint  ## lint and all tests
	$(BIN)/python -m pytest

test-quick: setup  ## the tests that need no server
	$(BIN)/python -m pytest -m "not slow"

lint: setup  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## apply ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## the benchmarks whose figures stand in the README
	$(BIN)/python benchmarks/throughput.py --suite cpu --out out/throughput.json
	$(BIN)/python benchmarks/timing.py --out out/timing.json
	$(BIN)/python benchmarks/compression.py --out out/compression.json
	$(BIN)/python benchmarks/pareto.py vllm_jd/data/adapters --out out/pareto.json

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist out *.egg-info
