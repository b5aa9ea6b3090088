PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
MODEL ?=
export PYTHONDONTWRITEBYTECODE := 1

.PHONY: setup build serve test test-full check format bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -q "torch==2.13.0" --extra-index-url https://download.pytorch.org/whl/cpu
	$(BIN)/python -m pip install -q "scikit-build-core>=0.10" "nanobind>=2.4" "cmake>=3.25" ninja
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

build: setup
	@$(BIN)/cmake -S . -B build -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja > build.log 2>&1 || (cat build.log; exit 1)
	@$(BIN)/cmake --build build
	@rm -f build.log

serve: build
	$(BIN)/python -m tokenspeed serve $(MODEL) --port $(PORT)
