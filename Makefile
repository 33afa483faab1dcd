# `make` lists the targets. Everything happens in .venv; nothing outside this folder is touched.

# The torch that `make setup` installs when .venv has none. It is pinned here, and not in the package (which wants torch>=2.6),
# because a bare `torch` may download gigabytes of GPU libraries. Both can be set: make setup TORCH=2.10.0
# TORCH_ARGS goes to that one pip command, for instance TORCH_ARGS="--index-url URL-of-the-CPU-wheels".
TORCH ?= 2.13.0
TORCH_ARGS ?=
PYTEST_ARGS ?=
TEST_JOBS ?= 2
# The diffusers that `make test-versions` tests beside the one in .venv, and the tests: what stands in other people's code.
VERSIONS ?= 0.35.2 0.38.0 0.40.0
VERSION_TESTS ?= $(addprefix hasten/tests/test_,$(addsuffix .py,steps handles fuzz reached ownership))
BENCH_MODEL ?= emoji-flux
BENCH_METHODS ?= reuse,taylorseer,hicache,foca
BENCH_COMPUTED_STEPS ?= 12,9,7
BENCH_PROMPTS ?= 16
BENCH_OUT ?= out/bench

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROJECTS := hasten zoo drape
# One pytest run for both projects, with the settings of hasten and paths as seen from here. Names of test files have to
# differ between the two projects. The models of the tests are small: one thread a process, and a process a core, is fastest.
PYTEST_CONFIG := -c hasten/pyproject.toml --rootdir . -n $(TEST_JOBS)
TESTS := hasten/tests zoo/tests drape/tests
METADATA := $(PROJECTS:%=%/pyproject.toml)
STAMP := $(VENV)/.setup-done
DOCS_STAMP := $(VENV)/.docs-done

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all test-versions mutants lint types bench docs wheels tutorial clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create .venv and install both projects into it (only if missing or stale)
	@echo "ready: $(BIN)/hasten --help"

# A Python counts only if it runs: version managers leave python3.13 commands that do nothing but complain.
$(STAMP): $(METADATA)
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$usable" >/dev/null 2>&1; then \
	  found=; \
	  for candidate in python3.13 python3.12 python3.11 python3; do \
	    if "$$candidate" -c "$$usable" >/dev/null 2>&1; then found=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "error: hasten needs Python 3.11 or newer with its venv module, and none of python3.13, python3.12," >&2; \
	    echo "       python3.11 and python3 is one. Install one (on Debian and Ubuntu also its package python3-venv)," >&2; \
	    echo "       then run make setup again." >&2; \
	    exit 1; \
	  fi; \
	  echo "== creating $(VENV) with $$("$$found" --version) ($$found)"; \
	  "$$found" -m venv --clear $(VENV); \
	fi
	@if $(BIN)/python -c 'import importlib.metadata as m; print("== torch", m.version("torch"), "is installed already")' 2>/dev/null; \
	then :; else \
	  echo "== installing torch $(TORCH) (the large part; a few minutes)"; \
	  $(PIP) install $(TORCH_ARGS) "torch==$(TORCH)"; \
	fi
	@echo "== installing $(PROJECTS), editable, with what their tests need"
	@$(PIP) install $(PROJECTS:%=-e "./%[test]")
	@touch $@

demo: $(STAMP) ## draw pictures with and without acceleration into out/demo
	$(BIN)/hasten demo --out out/demo

test: $(STAMP) ## run the tests but for the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_CONFIG) $(TESTS) -m "not slow" $(PYTEST_ARGS)

test-all: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_CONFIG) $(TESTS) $(PYTEST_ARGS)

test-versions: $(STAMP) $(VERSIONS:%=.versions/%/.done) ## run the tests of pipelines with older diffusers, too
	for python in $(VERSIONS:%=.versions/%/bin/python) $(BIN)/python; do \
	  "$$python" -c 'import diffusers; print("== diffusers", diffusers.__version__)'; \
	  OMP_NUM_THREADS=1 "$$python" -m pytest $(PYTEST_CONFIG) $(VERSION_TESTS) -m "not slow" $(PYTEST_ARGS); \
	done

# An environment on top of .venv: torch and all else is shared, but for diffusers and what it does not go with.
.versions/%/.done: $(STAMP)
	$(BIN)/python -m venv --clear .versions/$*
	shared=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	own=$$(.versions/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	.versions/$*/bin/python -m pip --disable-pip-version-check install "diffusers==$*" ftfy \
	  $(if $(filter 0.35.%,$*),"transformers<5",transformers)
	touch $@

mutants: $(STAMP) ## change one decision of the source at a time and see whether a test fails (a quarter of an hour)
	$(BIN)/python hasten/mutants/run.py $(MUTANTS)

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check $(PROJECTS)
	$(BIN)/ruff check --config hasten/pyproject.toml benchmarks
	$(BIN)/ruff format --check $(PROJECTS)
	$(BIN)/ruff format --check --config hasten/pyproject.toml benchmarks
	cd hasten && ../$(BIN)/lint-imports --no-logo
	@$(MAKE) --no-print-directory types

types: $(STAMP) ## check types (mypy, strict)
	cd hasten && ../$(BIN)/mypy src
	cd zoo && ../$(BIN)/mypy src
	cd drape && ../$(BIN)/mypy src

bench: $(STAMP) ## measure the methods on the reference model, then write the report into out/bench
	@mkdir -p $(BENCH_OUT)
	$(BIN)/hasten bench --model $(BENCH_MODEL) --methods $(BENCH_METHODS) --computed-steps $(BENCH_COMPUTED_STEPS) \
	  --prompts $(BENCH_PROMPTS) --seed 0 --json $(BENCH_OUT)/$(BENCH_MODEL).json
	$(BIN)/hasten report $(BENCH_OUT)/$(BENCH_MODEL).json

$(DOCS_STAMP): $(STAMP)
	@echo "== installing what the site needs"
	@$(PIP) install -e "./hasten[docs]"
	@touch $@

docs: $(DOCS_STAMP) ## build the site into site/
	$(BIN)/python -m mkdocs build --strict --site-dir site

wheels: $(STAMP) ## build the wheels of the three projects into out/wheels
	rm -rf out/wheels
	$(PIP) wheel --no-deps --wheel-dir out/wheels $(PROJECTS:%=./%)

tutorial: $(STAMP) ## run the code of the tutorial from top to bottom
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_CONFIG) hasten/tests/test_page_code.py -k tutorial

clean: ## remove .venv, .versions, caches, out/ and site/ (runs/ stays)
	rm -rf $(VENV) .versions out site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(foreach p,$(PROJECTS),$(p)/.pytest_cache $(p)/.mypy_cache $(p)/.ruff_cache $(p)/.hypothesis $(p)/dist)
	find $(PROJECTS) -name __pycache__ -type d -prune -exec rm -rf {} +
