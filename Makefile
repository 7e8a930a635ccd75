# `make help` lists the targets. Every target sets up .venv by itself.

PYTHON ?= python3
RECIPE ?= tiny
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Waiting OpenMP threads sleep: see pipeline/__init__.py.
export OMP_WAIT_POLICY ?= PASSIVE

CHAIN = --recipe $(RECIPE) $(if $(DATA),--data "$(DATA)") $(if $(VAL),--val "$(VAL)") \
	$(if $(LAMBDA),--lmbda $(LAMBDA)) $(if $(BASELINE),--baseline "$(BASELINE)") \
	$(if $(FROM),--$(FROM)) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help install build baseline stage1 stage2 stage3 stage4 plan audit report ui test test-all test-gpu test-cluster test-server bench \
	bench-gpu fuzz soak conformance portability check clean

help: ## list the targets and variables
	@awk -F ":.*## " '/^[a-z0-9 -]+:.*## / {sub(/1 stage2.*/, "N", $$1); printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  RECIPE=tiny|evidence|base|large|a folder   DATA=training images   VAL=validation images (folders)"
	@echo "  LAMBDA=0.013   BASELINE=official.pth.tar|baseline.safetensors   FROM=scratch   ARGS='--set phase2.seed=1 …'"

OLDEST := 3.11
RECENT = -c 'import sys; sys.exit(sys.version_info < ($(subst .,$(COMMA) ,$(OLDEST))))'
COMMA := ,

# An incomplete environment, or one with an older Python, is created again.
$(READY): pyproject.toml
	@$(BIN)/python $(RECENT) 2>/dev/null && $(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) $(RECENT) 2>/dev/null || { echo "error: this needs Python $(OLDEST) or newer, and $(PYTHON) is" \
			"$$($(PYTHON) -V 2>&1). Give another one, as in 'make install PYTHON=python$(OLDEST)'" >&2; exit 1; }; \
		$(PYTHON) -m venv --clear $(VENV); }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(READY) ## create .venv with all dependencies

build: $(READY) ## compile the kernels and the range coder before their first use
	$(BIN)/python -W ignore -m modules.native_build

baseline: $(READY) ## train the Baseline, or use the one in BASELINE=
	$(BIN)/hpcm run baseline $(CHAIN)

stage1 stage2 stage3 stage4: $(READY) ## migrate a checkpoint to Phase N (1 to 4), through all stages before it
	$(BIN)/hpcm run phase$(@:stage%=%) $(CHAIN)

plan: $(READY) ## show what stage4 would run, and why; MEASURE=1 measures time and memory
	$(BIN)/hpcm plan phase4 $(if $(MEASURE),--measure) $(CHAIN)

audit: $(READY) ## show what each stage changed, and verify its files
	$(BIN)/hpcm audit $(ARGS)

report: $(READY) ## write all results to runs/report/report.html
	$(BIN)/hpcm report $(ARGS)

ui: $(READY) ## serve MLflow's pages on a free port, and print their address
	@$(BIN)/hpcm ui $(ARGS)

# One process of tests per core, up to 8: each takes up to 3 GB. More threads would only wait for each other.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

test: $(READY) ## run the tests, without the slow ones
	$(PARALLEL) -m "not slow and not gpu and not nvcc"

test-all: $(READY) ## run the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY) ## run the tests and the benchmark that need a CUDA device
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tests/benchmarks/biwkv4.py --device cuda --dtype float32
	$(BIN)/python tests/benchmarks/biwkv4.py --device cuda --dtype bfloat16

bench: $(READY) ## measure the speed of the kernel; ARGS='--device cuda'
	$(BIN)/python tests/benchmarks/biwkv4.py $(ARGS)

bench-gpu: $(READY) ## measure training steps and coding on a GPU, by part; takes less than nine minutes
	$(BIN)/python tests/benchmarks/gpu.py $(ARGS)

test-cluster: $(READY) ## run jobs on a SLURM, and a run on two nodes, on this machine; needs root and slurm-wlm
	$(BIN)/python -m pytest -s -m slow tests/stages

test-server: $(READY) ## run chains against an MLflow server on PostgreSQL; needs root and Debian's postgresql
	$(BIN)/pip install --quiet --disable-pip-version-check psycopg2-binary Flask-WTF
	$(BIN)/python -m pytest -s -m slow tests/pipeline/tracking/test_server.py

soak: $(READY) ## kill and resume a small chain KILLS=100 times; compare with an uninterrupted one
	$(BIN)/python tests/pipeline/soak.py --kills $(or $(KILLS),100)

fuzz: $(READY) ## decode 100 000 damaged files and streams under a memory limit
	$(BIN)/python tests/modules/fuzz_bitstream.py 100000

conformance: $(READY) ## write the streams of `hpcm verify` again, after the bundled weights changed
	$(BIN)/python tests/pipeline/write_conformance.py

portability: $(READY) ## encode a photograph under thirteen floating-point configurations, decode each under all
	$(BIN)/python tests/modules/float_configurations.py runs/portability

check: $(READY) ## lint, check format and types; with nvcc, compile the CUDA source for three architectures
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m nvcc

clean: ## remove .venv and caches, but not runs/
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build
