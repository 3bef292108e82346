# make demo   run a real model over 200 real rows on this machine's CPU
# make test   the CPU suite, without the tests marked long
# make faults five seeds of all 28 kinds of faults against real jobs, others each day: 22 minutes of two idle cores
# make check  what CI runs before the suite: lint, types, sizes
# make clean  remove everything that the targets above made
#
# Each target makes its own virtual environment (VENV) and fetches model and rows (.cache/) when they are missing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST_ARGS ?=
MARKERS ?= not gpu and not long
# These start Ray jobs, or many processes: each has the machine for itself, because two at once take four times as long.
JOBS := tests/engine/test_engine_process.py notebooks \
	$(addprefix tests/processors/, test_ray.py test_scale.py test_engine_pool.py test_functions.py) \
	$(addprefix tests/pipelines/, test_run.py test_resume.py test_cli.py test_bench.py test_faults.py)
PYTEST = $(TEST_ENV) $(BIN)/python -m pytest -m "$(MARKERS)" $(PYTEST_ARGS)
# One torch thread for each test process: two of them share the machine with Ray's workers, which would starve beside
# them at the niceness of 15 that Ray gives its workers. Byte code is kept, whatever the machine's rule: without it each
# of the many processes compiles torch, transformers and Ray anew, for 10 s.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

.PHONY: install fetch demo test test-parts test-jobs faults lint format types sizes check clean

install: $(STAMP)

# torch is named in the first pip call: alone in the resolver's hands it would bring a build of several GB.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt torch==2.13.0 -e '.[dev]'
	touch $@

fetch: $(STAMP)
	$(BIN)/python tools/fetch.py

demo: fetch
	$(BIN)/rayinfer run examples/demo.yaml --overwrite

test: test-parts test-jobs

test-parts: fetch
	$(PYTEST) -n 2 --dist loadfile tests $(addprefix --ignore=, $(JOBS))

test-jobs: fetch
	$(PYTEST) --nbmake $(JOBS)

faults: fetch
	$(TEST_ENV) $(BIN)/python -m benchmarks.faults --seeds 5 --first-seed $$(($$(date +%s) / 86400 * 5)) \
		--side-by-side --no-result --records out/faults.jsonl

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy -p rayinfer

sizes: $(STAMP)
	$(BIN)/python tools/size_report.py

check: lint types sizes

clean:
	rm -rf $(VENV) .cache build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
