# `make demo` and `make test` set up everything they need; see `make help`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo msc compare flexlora bench-setup bench bench-quick test test-flower test-report prove-attacks check lint types format clean

help:  ## say what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/ready  ## make .venv with the tested versions

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup  ## fine-tune the bundled model across clients of different ranks
	$(BIN)/hetlora run examples/demo.toml

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

test: check  ## lint, types, the whole test suite, and the benchmarks at small sizes
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadscope -q
	$(BIN)/python -m benchmarks --quick

test-flower: setup  ## ten rounds over real processes with TLS and keys in which clients and server die (10 minutes)
	$(BIN)/python -m proofs.flower

test-report: setup  ## the page of hetlora report, in a real Chromium where there is one; screenshots in build/report
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -rs tests/test_report.py tests/test_report_browser.py

prove-attacks: setup  ## two hostile clients of ten against every defence (20 minutes)
	$(BIN)/python -m proofs.attacks

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
	rm -rf .venv .venv-bench runs .pytest_cache .mypy_cache .ruff_cache .hypothesis build
