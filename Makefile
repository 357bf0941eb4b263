# Two commands to know: `make train` runs the main job, `make test` the whole suite.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml setup.py constraints.txt
SOURCES := $(wildcard csrc/*)

# A thread that spins while it waits takes the core that the others need.
export OMP_WAIT_POLICY ?= passive

.PHONY: train test bench kernels lint test-sanitize clean

train: $(VENV)/.train
	$(BIN)/psfast-train $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)

kernels: $(VENV)/.test
	$(BIN)/python -m psfast.kernels.compile $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
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
	$(PIP) torch setuptools wheel ninja
	$(PIP) --no-build-isolation -e .
	touch $@
