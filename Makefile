# make map   what every head of a model does: installs what it needs, maps, writes atlas/<model>/report.html
# make test  everything a change must pass
# Stamp files in .venv make second runs instant.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help map model test test-slow ready lint style floors types dead format unit web web-check docs docs-check hooks bench clean

VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= default
ARGS ?=
# The first Python here that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Two pytest workers share the machine: one thread each.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HEADWISE_PROGRESS=0 $(BIN)/python -m pytest

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile
	@echo "make test-slow | lint | format | web | docs | hooks | clean"

map: $(VENV)/.installed
	@$(BIN)/headwise map $(MODEL) $(ARGS)

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "headwise needs Python 3.11 or newer; python3 here is $$(python3 --version 2>&1). On Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || bash .ci/apt headwise-venv-is-missing python3-venv
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing headwise and what it needs into $(VENV) ..."
	@$(PIP) -e .
	@touch $@

# One run of pip for both.
$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing headwise and what its tests need into $(VENV) ..."
	@$(PIP) -e '.[dev]'
	@touch $(VENV)/.installed $@

# The page test drives Debian's Chromium; pyright and the views need Node.
$(VENV)/.system: .ci/apt | $(VENV)/.made
	@bash .ci/apt npm nodejs npm
	@bash .ci/apt chromium,chromium-browser,google-chrome chromium
	@touch $@

web/node_modules/.stamp: web/package-lock.json | $(VENV)/.system
	@cd web && npm ci --silent --no-audit --no-fund
	@touch $@

model: $(VENV)/.installed
	@$(BIN)/python -c 'from headwise.models import default_model_path; print("default model:", default_model_path().name)'

# Two at a time: pip beside apt and npm, types beside what else is checked without running anything.
test:
	@$(MAKE) --no-print-directory -j2 ready
	@$(MAKE) --no-print-directory -j2 lint
	@$(MAKE) --no-print-directory unit

ready: $(VENV)/.dev web/node_modules/.stamp

lint: types docs-check style floors dead

style: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

floors: $(VENV)/.dev
	@$(BIN)/lint-imports

types: $(VENV)/.dev $(VENV)/.system
	@$(BIN)/pyright

dead: $(VENV)/.dev
	@$(BIN)/vulture

format: $(VENV)/.dev
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

unit: $(VENV)/.dev web/node_modules/.stamp model
	@$(PYTEST) $(ARGS)

# Every replication at its default size among them: hours. Files are shared out test by test, as one file has them all.
test-slow: $(VENV)/.dev web/node_modules/.stamp model
	@$(PYTEST) -m slow --dist worksteal $(ARGS)

web: web/node_modules/.stamp
	@cd web && npm run --silent build

# The built views are committed; they must be what their sources build.
web-check: web
	@test -z "$$(git status --porcelain -- headwise/view/static)" || { \
		git status --short -- headwise/view/static; \
		echo "The built views differ from what web/ builds. Run 'make web' and commit headwise/view/static." >&2; exit 1; }

docs: $(VENV)/.installed
	@$(BIN)/python docs/generate.py

docs-check: $(VENV)/.dev
	@$(BIN)/python docs/generate.py --check

# Reading, scans and the map beside the peers, in environments of their own; about an hour on a quiet machine of two
# cores. Caches, drafts, circuits and planted models: see the first lines of their files in bench/.
bench: $(VENV)/.dev model
	@$(BIN)/python bench/read_sites.py
	@$(BIN)/python bench/ablation_scan.py sample
	@$(BIN)/python bench/ablation_scan.py sample --job scan_all
	@$(BIN)/python bench/ablation_scan.py full
	@$(BIN)/python bench/screen.py
	@$(BIN)/python bench/map_time.py
	@$(BIN)/python bench/report.py

hooks: $(VENV)/.dev
	@$(BIN)/prek install

clean:
	rm -rf $(VENV) web/node_modules build dist .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
