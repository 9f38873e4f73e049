# Two commands do everything on a fresh machine: `make search` and `make test`.
# They need Python 3.11 or later with venv, and make; everything else goes into .venv.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= auto
SOURCES := nas search_space kernels trainers storage dashboards

.PHONY: install search test test-all lint bench soak readme format clean

install: $(VENV)/.runtime

$(VENV)/.runtime: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,oracles]'
	touch $@

# The main job on embedded defaults: SQLite, a local Ray, the CPU. ARGS adds options, e.g. ARGS='--trials 64'.
search: $(VENV)/.runtime
	$(BIN)/nas search $(ARGS)

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One worker a core: the promises are asked of every mixer, and most of them are many small operations.
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not exhaustive" $(ARGS)

# With what repeats at length what the tests above ask of a part: some ten minutes more.
test-all: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: $(VENV)/.development
	$(BIN)/python -m benchmarks.run

# Two thousand short trials while drivers and workers are killed every few seconds, on SQLite and PostgreSQL.
soak: $(VENV)/.development
	$(BIN)/python -m benchmarks.soak $(ARGS)

# The table of all mixers in README.md, made anew from the vocabulary.
readme: $(VENV)/.runtime
	$(BIN)/python -m nas.mixer_table README.md

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
