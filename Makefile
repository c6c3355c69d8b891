# make test   sets everything up, builds, checks style and types, runs all tests
# make demo   sets everything up, builds, meta-trains on MovieLens and leaves its results in runs/demo
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: env test lint format demo bench clean

env: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.24" ninja numpy

# No build isolation: the extension is compiled against the torch it will run with, which is there already.
$(STAMP): $(BIN)/python $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run -Werror

test: lint
	$(BIN)/python -m pytest

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format -i

demo: $(STAMP)
	$(BIN)/python examples/movielens.py --out runs/demo

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf build dist *.egg-info metarec_fast/*.so
