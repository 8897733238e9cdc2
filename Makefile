# `make demo` and `make test` each do all the set-up themselves, in .venv: Python >= 3.10 and a C++ compiler
# are enough. On Windows, see the plain pip commands in README.md.
PYTHON ?= python3
BIN := .venv/bin
# How llama-cpp-python is compiled, after what CMAKE_ARGS asks for already (-DGGML_CUDA=on, say).
BUILD := CMAKE_ARGS="$$CMAKE_ARGS '-DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/teachers/llama_cpp/library/build.cmake'"

.PHONY: demo test setup doctor llama-cpp clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing (llama-cpp-python is compiled: about 5 minutes on 2 cores the first time) ..."
	$(BUILD) $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

doctor: setup
	$(BIN)/distill doctor

# Compile llama-cpp-python again, where an older wheel does not suit the processor (`distill doctor` says so).
llama-cpp: setup
	$(BUILD) $(BIN)/python -m pip install --constraint constraints.txt --force-reinstall --no-deps --no-cache-dir \
	  --no-binary llama-cpp-python llama-cpp-python

demo: setup
	$(BIN)/distill run --student-size 128x3 --samples 2048 --epochs 4

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
