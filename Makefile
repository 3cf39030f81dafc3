# `make lesson` and `make test` need nothing but python3 (3.11 or later), pip and make.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: lesson test corpus-test corpus trace-corpus torch-corpus lint benchmark scaling clean

# TORCH=1 installs PyTorch too, and runs it beside JAX.
lesson: $(VENV)/lesson$(TORCH)
	$(BIN)/jaxgrad lesson

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2
	JAXGRAD_WITHOUT_HOOK=1 $(BIN)/python -m pytest -q -n 2 -m bad_input tests

# All losses of tests/corpus, of which `make test` takes every second one.
corpus-test: $(VENV)/dev
	JAXGRAD_WHOLE_CORPUS=1 $(BIN)/python -m pytest -q -n 2 tests/test_corpus.py \
	  tests/test_check_corpus.py tests/test_tracing.py tests/test_torch_corpus.py
	JAXGRAD_WHOLE_CORPUS=1 $(BIN)/python -m pytest -q tests/test_checkpointed.py -k killed

# Four checkers on the corpus, side by side: about 10 minutes.
corpus: $(VENV)/dev
	$(BIN)/python examples/benchmarks/check_corpus.py

# trace_gradient on losses that are NaN, zero or healthy, beside jax_debug_nans.
trace-corpus: $(VENV)/dev
	$(BIN)/python examples/benchmarks/trace_corpus.py

# compare_with_torch on right and wrong ports, beside np.allclose.
torch-corpus: $(VENV)/dev
	$(BIN)/python examples/benchmarks/torch_corpus.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(VENV)/dev
	$(BIN)/python examples/benchmarks/overhead.py
	$(BIN)/python examples/benchmarks/check_speed.py
	$(BIN)/python examples/benchmarks/trace_speed.py

# How time and memory grow with rows, devices and parameters; beside others' loops.
scaling: $(VENV)/dev
	$(BIN)/python examples/benchmarks/scaling.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), sys.version'
	$(PYTHON) -m venv $(VENV) || \
	  ($(PYTHON) -m pip install --quiet --user --break-system-packages virtualenv && \
	   $(PYTHON) -m virtualenv $(VENV))

$(VENV)/lesson: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/lesson1: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[torch]'
	touch $@

$(VENV)/dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@
