# make test   sets everything up, builds, checks style and types, runs all tests
# make cuda-check   of these tests, those that need nvcc but no GPU: compiles, simulates, sanitizes, counts
# make demo   sets everything up, builds, meta-trains on MovieLens and leaves its results in runs/demo
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --benchmark-disable
CPP_FILES := find csrc tests/simulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: env test cuda-check lint format demo bench clean

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
	$(CPP_FILES) | xargs $(BIN)/clang-format --dry-run -Werror

test: lint
	$(PYTEST)

cuda-check: $(STAMP)
	$(PYTEST) -rs tests/test_simulator.py tests/test_cuda_*.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CPP_FILES) | xargs $(BIN)/clang-format -i

demo: $(STAMP)
	$(BIN)/python examples/movielens.py --out runs/demo

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf build dist *.egg-info metarec_fast/*.so
