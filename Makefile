# Two commands to know: `make train` runs the main job, `make test` the whole suite. `make help`
# lists all; a target's `## ...` is its line there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml setup.py constraints.txt
SOURCES := $(wildcard csrc/*)

.PHONY: help train test bench kernels lint test-sanitize clean

train: $(VENV)/.train ## the main job, parity without gradients; ARGS="key=value ..." overrides
	$(BIN)/psfast-train $(ARGS)

# A thread that spins while it waits takes the core that other tests' processes need. Alone on a
# machine, as for `train` and `bench`, spinning is faster.
test test-sanitize: export OMP_WAIT_POLICY ?= passive

test: $(VENV)/.test ## the whole suite; ARGS="..." for pytest
	$(BIN)/python -m pytest -n auto --maxprocesses 4 $(ARGS)

bench: $(VENV)/.test ## psfast against the reference and a clean serial loop
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

kernels: $(VENV)/.test ## compile every GPU kernel, without a GPU
	$(BIN)/python -m psfast.kernels.compile $(ARGS)

# The C++ extension's tests under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := build/sanitize/_C.so
SANITIZE := -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
test-sanitize: $(VENV)/.test ## the C++ extension under sanitizers
	$(BIN)/python -c "import sys; from pathlib import Path; from psfast import extension; \
	  extension.compile_library(Path(sys.argv[1]), sys.argv[2:])" $(SANITIZED) $(SANITIZE)
	PSFAST_LIBRARY=$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest tests/test_fused.py tests/test_extension.py

lint: $(VENV)/.test ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

clean: ## remove what was built, and the virtual environment
	rm -rf $(VENV) build dist *.egg-info psfast/_C*.so

# Each stamp says that an extra is installed as the project files ask for now.
$(VENV)/.train: $(VENV)/.built
	$(PIP) -e '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) -e '.[test]'
	touch $@

# The extension is built against the installed torch, hence without build isolation.
$(VENV)/.built: $(PROJECT) $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel
	$(PIP) --no-build-isolation -e .
	touch $@
