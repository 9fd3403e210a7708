# The only definition of this project's commands; hooks and CI call these. `make help` lists them.
# Settings are environment variables (README.md lists them); `make <target> NAME=value` sets one for that call.

PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup setup-dev demo up down test check bench lock clean \
        kafka-up kafka-down kafka-status kafka-topics kafka-logs kafka-wipe

help: ## this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv and install what the services need (PYTHON=, TORCH=cpu, PIP_FIND_LINKS=)
	@$(INSTALL)

setup-dev: ## setup, and what tests, checks and benchmarks need
	@$(INSTALL) --dev

demo: setup ## the whole stack on a catalogue, with a trained model (DATA=folder for MovieLens; API_PORT=)
	@$(BIN)/python -m api demo

up: setup ## broker, nearline jobs and API, without demo data
	@$(BIN)/python -m api up

down: ## stop what demo or up started, and only that; data stay
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m api down; \
	else echo "Nothing is running: there is no .venv."; fi

test: setup-dev ## all tests, the end-to-end ones against a real broker included (ARGS= for pytest)
	@$(BIN)/python -m pytest $(ARGS)

check: setup-dev ## ruff, mypy and the import rule
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m mypy
	@$(BIN)/python $(BIN)/lint-imports

bench: setup-dev ## one benchmark (NAME=, QUICK=1 for two minutes); without NAME: the list
	@$(BIN)/python -m tests.bench $(NAME) $(if $(filter 1,$(QUICK)),--quick) $(if $(SEED),--seed $(SEED))

kafka-up: setup ## start the local Kafka, or check that KAFKA_BOOTSTRAP=host:port answers
	@$(BIN)/python -m infra.kafka up

kafka-down: ## stop the local Kafka; its data stay
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m infra.kafka down; else echo "Kafka was not running."; fi

kafka-status: setup ## does Kafka run, and where
	@$(BIN)/python -m infra.kafka status

kafka-topics: setup ## make missing topics and list all
	@$(BIN)/python -m infra.kafka topics

kafka-logs: setup ## the end of the local Kafka's log
	@$(BIN)/python -m infra.kafka logs

kafka-wipe: setup ## stop the local Kafka, delete its data and what was derived from them
	@$(BIN)/python -m infra.kafka wipe

lock: setup-dev ## resolve requirements/*.in and infra/kafka/jgo.toml again
	@for name in base dev; do $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	  --upgrade --no-emit-index-url --no-header requirements/$$name.in -o requirements/$$name.txt || exit 1; done
	@$(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-deps \
	  --upgrade --no-emit-index-url --no-header requirements/peers.in -o requirements/peers.txt
	@echo 'prometheus-client>=0.26' | $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 \
	  --generate-hashes --upgrade --no-emit-index-url --no-header --override /dev/stdin \
	  tests/bench/peers/requirements.in -o tests/bench/peers/requirements.txt
	@$(BIN)/python -m jgo --resolver python --system-java --repo-cache .local/lock --cache-dir .local/lock/cache \
	  --file infra/kafka/jgo.toml lock

clean: ## delete caches; .venv, .local (data) and reports stay
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -not -path './.venv/*' -not -path './.local/*' -prune -exec rm -rf {} +

# A version check that every Python can read, then the real thing.
define INSTALL
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "Python 3.11 or newer is needed and '$(PYTHON)' is not one: choose one with PYTHON=/path/to/python3." >&2; exit 1; }; \
$(PYTHON) infra/install.py
endef
