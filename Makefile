# SPDX-License-Identifier: MIT
# `make serve` and `make test` do all the set-up they need.
PYTHON ?= python3
PORT ?= 8000
MODEL ?=
ARGS ?=
BIN := .venv/bin
CMAKE := $(BIN)/cmake
CXX_FILES := $(shell git ls-files 'csrc/*.h' 'csrc/*.cpp' 'tests/*.h' 'tests/*.cpp' 2>/dev/null)
TORCH ?= torch==2.13.0
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: help setup build serve test test-cpp test-full check format bench clean

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/.ready ## make .venv with everything in it

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@echo "setup: making .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	@# torch first and by itself: TORCH="torch==... --index-url ..." takes another build
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.25" ninja
	@echo "setup: compiling and installing tokenspeed"
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

build: setup ## compile what changed
	@$(CMAKE) -S . -B build/release -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -Wno-dev --log-level=WARNING
	@$(CMAKE) --build build/release -- --quiet

serve: build ## serve MODEL (default: the demo) on PORT
	$(BIN)/python -m tokenspeed serve $(MODEL) --port $(PORT) $(ARGS)

test: build test-cpp ## the quick suites (minutes)
	$(BIN)/python -m pytest -m "not full" $(ARGS)

test-cpp: setup ## the scheduler's C++ tests under ASan and UBSan
	@$(CMAKE) -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -Wno-dev \
	    -DTOKENSPEED_PYTHON=OFF -DTOKENSPEED_TESTS=ON --log-level=WARNING
	@$(CMAKE) --build build/asan -- --quiet
	$(BIN)/ctest --test-dir build/asan --output-on-failure -LE full

test-full: build ## everything, the slow suites too
	@$(MAKE) --no-print-directory test-cpp
	$(BIN)/ctest --test-dir build/asan --output-on-failure -L full
	$(BIN)/python -m pytest --timeout 3600 $(ARGS)

check: build ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: setup ## rewrite the sources as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: build ## every benchmark that fits a laptop
	$(BIN)/python benchmarks/scheduler.py
	$(BIN)/python benchmarks/gateway.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/demo.py
	$(BIN)/python benchmarks/groups.py
	$(BIN)/python benchmarks/parallel.py
	$(BIN)/python benchmarks/eplb.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python -m benchmarks.tenants --pairs 1000 --probes 200

clean: ## remove what was built, keep .venv
	rm -rf build tokenspeed/*.so
