# The commands of this project; `make help` lists them.
PYTHON_IN_VENV := .venv/bin/python
# Tests run in two processes, all tests of a file in the same one; TEST_PROCESSES=0 runs them in make's own, for a debugger.
TEST_PROCESSES ?= 2
PYTEST := $(PYTHON_IN_VENV) -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile

# Variables of make train: DATA=file or folder of interactions, OVERRIDES="train.lr=0.002 model.num_tables=4",
# CONFIG=configuration, which trains on its data.path unless DATA is given.
CONFIG ?= configs/quickstart.yaml
OVERRIDES ?=
DATA ?=
# $(value …) and the exported variables keep make and the shell from expanding $ or ` in file names.
override CONFIG := $(value CONFIG)
override DATA := $(value DATA)
export CONFIG DATA
TESTS ?=
# Left out: accuracy takes hours, serve needs two quiet cores for a quarter of an hour, table_exchange needs torchrun, user_ranks needs a run, roofline is part of the others.
BENCHMARKS ?= attention attention_shortcuts data_loading elementwise expert_ffn prepare sampled_softmax scaling \
	step_memory train_throughput

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint docs bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## create .venv with pinned dependencies (the CUDA build if an NVIDIA driver answers)
	@scripts/setup_environment.sh

train: setup ## set up, prepare the data and train; DATA=file uses your interactions; OVERRIDES="train.lr=0.002 …"
	@scripts/train.sh "$$CONFIG" "$$DATA" $(OVERRIDES)

test: setup ## set up and run the fast tests; TESTS=tests/launcher selects some
	@$(PYTEST) -m "not slow" $(TESTS)

test-slow: setup ## run the slow tests: process groups, whole training jobs
	@$(PYTEST) -m slow $(TESTS)

lint: setup ## run ruff check, ruff format --check and mypy
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy

docs: setup ## build the documentation site into site/; warnings are errors
	@.venv/bin/mkdocs build --quiet --clean

bench: setup ## run the benchmarks that take minutes; BENCHMARKS=attention selects some
	@for name in $(BENCHMARKS); do \
		echo "== $$name"; $(PYTHON_IN_VENV) -m benchmarks.$$name || exit $$?; \
	done

clean: ## remove files of tools, but not .venv, datasets/ or runs/
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mme kernels launcher benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
