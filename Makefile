# Every target sets up .venv first, when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo multihost test explore lint docs bench dist

demo: $(READY)
	$(BIN)/python examples/compare_clippers.py

multihost: $(READY)
	$(BIN)/python examples/multihost.py

test: lint docs
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Other random examples than those of `make test`, and many times as many. A failure prints what
# reproduces it: make explore SEED=... TIMES=...
SEED ?= $(shell date +%s)
TIMES ?= 50
explore: $(READY)
	EXPLORE=$(TIMES) $(BIN)/python -m pytest -n 2 -m hypothesis --hypothesis-seed=$(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

bench: $(READY)
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/aggregators.py
	$(BIN)/python benchmarks/sharded.py

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python >= 3.11 is needed; name one: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
