# Gates and short cuts; CI runs the same lines. `make` alone lists them.

PYTHON ?= python3
BIN := .venv/bin
SCRIPTS := .ci/run $(wildcard slurm/*.sbatch) $(shell find . -name '*.sh' -not -path './.venv/*')
BENCHMARKS := $(filter-out measure,$(basename $(notdir $(wildcard benchmarks/*.py))))

.DEFAULT_GOAL := help
.PHONY: help install check test demo bench clean

help:  ## list what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' Makefile | while read -r target what; do \
	  printf '  make %-8s %s\n' "$$target" "$$what"; done

install: .venv/installed  ## .venv with everything, at the versions of constraints.txt

.venv/installed: pyproject.toml constraints.txt Makefile
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

check: install  ## format, lint, types, direction of imports, shell scripts
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)

test: install  ## all tests
	$(BIN)/pytest

demo: install  ## data, training, scores, export, in a few minutes on two cores
	$(BIN)/mmcl demo

bench: install  ## every program in benchmarks/, results in build/bench/
	@mkdir -p build/bench
	@set -e; for name in $(BENCHMARKS); do \
	  echo "benchmarks/$$name.py"; $(BIN)/python "benchmarks/$$name.py" --json "build/bench/$$name.json"; done

clean:  ## remove .venv, build results and caches; runs/ stays
	rm -rf .venv build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
