# The commands of this project; `make help` lists them.
PYTHON_IN_VENV := .venv/bin/python
PYTEST := $(PYTHON_IN_VENV) -m pytest

# make train: DATA=file or folder of interactions, OVERRIDES="train.epochs=3 model.num_tables=2", CONFIG=another
# configuration, which without DATA trains on its own data.path
CONFIG ?= configs/quickstart.yaml
OVERRIDES ?=
DATA ?=
# As they are given: neither make nor, in the recipe, the shell expands a $ or ` in the name of a file.
override CONFIG := $(value CONFIG)
override DATA := $(value DATA)
export CONFIG DATA
TESTS ?=
# Not among them: accuracy takes hours, table_exchange needs torchrun, user_ranks a run; roofline is part of the others.
BENCHMARKS ?= attention attention_shortcuts data_loading elementwise expert_ffn prepare sampled_softmax scaling \
	step_memory train_throughput

.DEFAULT_GOAL := help
.PHONY: help setup train test test-slow lint docs bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## the environment alone: .venv with pinned dependencies (CUDA build where an NVIDIA driver answers)
	@scripts/setup_environment.sh

train: setup ## set up, prepare the data and train; DATA=file: on your interactions; OVERRIDES="train.epochs=3 …"
	@scripts/train.sh "$$CONFIG" "$$DATA" $(OVERRIDES)

test: setup ## set up and run the tests that are not slow; TESTS=tests/launcher: some of them
	@$(PYTEST) -m "not slow" $(TESTS)

test-slow: setup ## the slow tests: process groups, whole training jobs
	@$(PYTEST) -m slow $(TESTS)

lint: setup ## ruff check, ruff format --check, mypy
	@$(PYTHON_IN_VENV) -m ruff check .
	@$(PYTHON_IN_VENV) -m ruff format --check .
	@$(PYTHON_IN_VENV) -m mypy

docs: setup ## build the documentation site into site/; warnings are errors
	@.venv/bin/mkdocs build --quiet --clean

bench: setup ## the benchmarks that take minutes; BENCHMARKS=attention: some of them
	@for name in $(BENCHMARKS); do \
		echo "== $$name"; $(PYTHON_IN_VENV) -m benchmarks.$$name || exit $$?; \
	done

clean: ## remove what the tools left behind (not .venv, datasets/ or runs/)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mme kernels launcher benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
