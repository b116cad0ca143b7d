# Every target sets up what it needs on a fresh machine: a virtual environment in .venv, pinned by
# constraints.txt (torch first: another release would bring several GB of CUDA packages).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CLEAN_CACHE := rm -rf .import_linter_cache
LAB_TESTS := lab/tests lab/src
# Tests run in one process a core (WORKERS=0: in pytest's own), each with one thread of torch: more would spin against
# each other. A file's tests stay in one process, so what a module prepares is made once.
WORKERS ?= logical
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 8 --dist loadfile

.PHONY: setup demo test test-lab test-slow test-zero test-oldest check fmt coverage mutants hooks docs peft-suite bench gpu ci

setup: .venv/dev.stamp

.venv/cli.stamp: pyproject.toml lab/pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PIP) -e ".[cli]" -e ./lab
	touch $@

.venv/dev.stamp: .venv/cli.stamp
	$(PIP) -e ".[dev]" -e "./lab[dev]"
	touch $@

demo: .venv/cli.stamp
	$(BIN)/dynlora demo

test: .venv/dev.stamp
	$(PYTEST) -m "not slow"

test-lab: .venv/dev.stamp
	$(PYTEST) -m "not slow" $(LAB_TESTS)

test-slow: .venv/dev.stamp
	$(PYTEST) -m slow tests $(LAB_TESTS)

.venv/zero.stamp: .venv/dev.stamp
	$(PIP) hatchling editables
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e ".[zero]"
	touch $@

test-zero: .venv/zero.stamp
	$(PYTEST) -m slow -k zero tests/allocator/test_distributed.py

# The lower bounds of pyproject.toml, beside the pinned torch.
OLDEST = $(shell sed -nE 's/^ +"(transformers|peft|accelerate)>=([0-9.]+),.*/\1==\2/p' pyproject.toml)

.venv-oldest/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet \
		"torch==$$(sed -n 's/^torch==//p' constraints.txt)" $(OLDEST) -e ".[dev]"
	touch $@

test-oldest: .venv-oldest/stamp
	$(subst $(BIN),.venv-oldest/bin,$(PYTEST)) -m "not slow" -W default tests

check: .venv/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(CLEAN_CACHE) && $(BIN)/lint-imports
	$(BIN)/deptry src
	cd lab && ../$(BIN)/deptry src
	$(BIN)/vulture

coverage: .venv/dev.stamp
	$(PYTEST) -m "not slow" tests src $(LAB_TESTS) --cov --cov-report=term --cov-fail-under=97
	$(BIN)/coverage report --include="*/allocation/*" --fail-under=100

mutants: .venv/dev.stamp
	$(PIP) mutmut && HF_HUB_OFFLINE=1 $(BIN)/mutmut run

hooks: .venv/dev.stamp
	$(BIN)/pre-commit install

fmt: .venv/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/docs.stamp: .venv/cli.stamp
	$(PIP) -e ".[docs]"
	touch $@

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

peft-suite: .venv/dev.stamp
	$(PIP) parameterized
	$(BIN)/python scripts/peft_suite.py

bench: .venv/dev.stamp
	$(PIP) matplotlib
	for question in step_cost step_cost_4bit allocator_cost whole_run render; do \
		HF_HUB_OFFLINE=1 $(BIN)/python -W ignore benchmarks/$$question.py || exit 1; done

# every run keeps a folder of its own: cases that it left out stay as an earlier run measured them
gpu: GPU_RUN = benchmarks/results/gpu/$(shell date -u +%F)-$(shell git rev-parse --short=7 HEAD)
gpu: .venv/dev.stamp
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/gpu_check.py --seconds 520 --out $(GPU_RUN)
	$(BIN)/python benchmarks/render.py

ci: check test test-lab demo
