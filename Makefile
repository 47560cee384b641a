# Cohortium's tasks. Everything runs in .venv, made with nothing but Python 3.11+ and the network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FLOWER := .venv-flower
NVFLARE := .venv-nvflare
CONSTRAINTS := constraints.txt
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint type arch docs bench bench-flamby bench-engine bench-secagg bench-privacy bench-fleet chaos format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed")'
	$(PYTHON) -m venv $(VENV)

# one stamp for each set of packages, renewed when what they need changes
$(VENV)/.demo: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[coordinator]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test,coordinator,telemetry,torch,privacy,rlwe,ckks]'
	@touch $@ $(VENV)/.demo

setup: $(VENV)/.test ## everything for development, PyTorch too

demo: $(VENV)/.demo ## four real hospitals learn one model; writes cohortium-demo/report.html
	$(BIN)/cohortium demo --out cohortium-demo

test: lint type arch ## lint, types, import contracts and the tests
	$(BIN)/python -m pytest -n $(WORKERS)

test-all: lint type arch ## the slow tests too
	$(BIN)/python -m pytest -n $(WORKERS) -m ''

lint: $(VENV)/.test ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/.test ## mypy, strict
	$(BIN)/mypy

arch: $(VENV)/.test ## import contracts
	$(BIN)/lint-imports

docs: $(VENV)/.test ## regenerate the reference pages and run every code block
	$(BIN)/python tools/study_reference.py
	$(BIN)/python tools/command_reference.py
	$(BIN)/python tools/readme_figures.py
	$(BIN)/python -m pytest tests/docs

bench: bench-engine bench-flamby bench-secagg bench-privacy bench-fleet ## all benchmarks

bench-flamby: $(VENV)/.test ## FLamby's Fed-Heart-Disease, five seeds
	$(BIN)/python benchmarks/bench_flamby.py
	$(BIN)/python tools/readme_figures.py

bench-engine: $(VENV)/.test ## overhead of the local engine
	$(BIN)/python benchmarks/bench_engine.py
	$(BIN)/python tools/readme_figures.py

# Flower's packages, apart from ours; without them the bench leaves its figures out
$(FLOWER)/.done:
	$(PYTHON) -m venv $(FLOWER)
	-$(FLOWER)/bin/python -m pip install --quiet 'flwr==1.41.*'
	@touch $@

bench-secagg: $(VENV)/.test $(FLOWER)/.done ## masking beside Flower's, encryption beside TenSEAL's
	$(BIN)/python benchmarks/bench_secagg.py --flower-python $(FLOWER)/bin/python
	$(BIN)/python tools/readme_figures.py

$(VENV)/.bench: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	@touch $@

bench-privacy: $(VENV)/.bench ## AUC against epsilon on FLCHAIN, and the speed of noise
	$(BIN)/python benchmarks/bench_privacy.py
	$(BIN)/python tools/readme_figures.py

# NVFLARE's packages, apart from ours, as Flower's
$(NVFLARE)/.done:
	$(PYTHON) -m venv $(NVFLARE)
	-$(NVFLARE)/bin/python -m pip install --quiet 'nvflare==2.9.*'
	@touch $@

bench-fleet: $(VENV)/.test $(FLOWER)/.done $(NVFLARE)/.done ## rounds over mutual TLS between processes, beside NVFLARE's and Flower's
	$(BIN)/python benchmarks/bench_fleet.py --flower-python $(FLOWER)/bin/python --nvflare-python $(NVFLARE)/bin/python
	$(BIN)/python tools/readme_figures.py

chaos: $(VENV)/.test ## 230 seeded faults over real processes, and whether any result is wrong or lost
	$(BIN)/python benchmarks/chaos.py

format: $(VENV)/.test ## let ruff rewrite the layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and what tools left
	rm -rf $(VENV) $(FLOWER) $(NVFLARE) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
