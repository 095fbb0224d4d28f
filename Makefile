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

# What `make gpu-first` uses: a bare GPU machine's own Python; and its rehearsal: that machine's
# versions, for a CPU, in an environment of their own.
BARE_PYTHON ?= python3
REHEARSAL_PYTHON ?= python3.12
REHEARSAL_VENV ?= build/venv-rehearsal

.PHONY: help setup demo test test-quick lint format bench roofline gpu-check gpu-first \
	gpu-first-bundle gpu-first-rehearsal clean

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

gpu-first:  ## what one bare GPU can prove in eight minutes; no network, no vLLM: docs/gpu-first.md
	$(BARE_PYTHON) benchmarks/gpu_first.py run

gpu-first-bundle: setup  ## what such a machine lacks, to be carried there: build/gpu-first
	$(BIN)/python benchmarks/gpu_first.py bundle

gpu-first-rehearsal: gpu-first-bundle  ## the same on a CPU under the GPU machine's versions (3 GB)
	$(REHEARSAL_PYTHON) -m venv $(REHEARSAL_VENV)
	$(REHEARSAL_VENV)/bin/pip install -q -r benchmarks/gpu_steps/requirements.txt
	$(REHEARSAL_VENV)/bin/pip uninstall -q -y pydantic pydantic-core  # not there, either
	$(REHEARSAL_VENV)/bin/python benchmarks/gpu_first.py run --small --seconds 4000 \
		--out out/gpu-first-rehearsal-$$(date +%Y%m%d-%H%M%S)

clean:  ## remove the environment and what was built
	rm -rf $(VENV) build dist out *.egg-info
