# `make demo` and `make test` each do all the set-up themselves, in .venv: Python >= 3.10 and a C++ compiler
# are enough. On Windows, see the plain pip commands in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test setup clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing (llama-cpp-python is compiled: about 5 minutes on 2 cores the first time) ..."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/distill run --student-size 128x3 --samples 2048 --epochs 4

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
