# `make demo` and `make test` set up what they need in .venv; nothing else has to be installed
# beforehand but Python 3.11+, a C++ compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What `make gpu-check` uses: an environment with vLLM for CUDA where there is a GPU, and the model
# of the paper's throughput experiment (a folder, or a name on the Hugging Face Hub).
GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU')
GPU_VENV ?= build/venv-cuda
PAPER_MODEL ?= mistralai/Mistral-7B-Instruct-v0.2

.PHONY: help setup demo test test-quick lint format bench roofline gpu-check clean

help:  ## what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## virtual environment with vLLM (CPU) and the package

$(READY): pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	@touch $@

demo: setup  ## compress the shipped adapters, serve them, ask them: end to end on this machine
	$(BIN)/vllm-jd demo

test: setup lint  ## lint and all tests
	$(BIN)/python -m pytest -n 2

test-quick: setup  ## the tests that need no server
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: setup  ## ruff: lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup  ## apply ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## the benchmarks whose figures stand in docs/
	$(BIN)/python benchmarks/throughput.py --suite cpu --out out/throughput.json
	$(BIN)/python benchmarks/timing.py --out out/timing.json
	$(BIN)/python benchmarks/compression.py --out out/compression.json
	$(BIN)/python benchmarks/pareto.py vllm_jd/data/adapters --out out/pareto.json

roofline: setup  ## what the adapters should cost on an H100: a model, not a measurement
	$(BIN)/python benchmarks/roofline_report.py --out out/roofline.json

ifneq ($(GPU),)
gpu-check:  ## the first run on a GPU: tests, tuning, measurements, one report folder below out/
	$(MAKE) setup VENV=$(GPU_VENV) EXTRAS=cuda,test,bench
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py run --model $(PAPER_MODEL)
else
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py run --model $(PAPER_MODEL)
endif

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist out *.egg-info
