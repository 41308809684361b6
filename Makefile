# Two commands from a fresh clone: `make demo` runs the main job, `make test` passes the tests.
# Each makes its own virtual environment in .venv, with the pinned development constraints.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check bench report clean

demo: $(READY)
	$(BIN)/tqsearch demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 -q

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m benchmarks.report --check

bench: $(READY)
	$(BIN)/python -m benchmarks distortion
	$(BIN)/python -m benchmarks search --dataset synthetic-embeddings

report: $(READY)
	$(BIN)/python -m benchmarks.report

$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV)
