# Every target sets up .venv first, when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo multihost test pytest checks explore lint docs bench bench-compiled \
  compilers dist

demo: $(READY)
	$(BIN)/python examples/compare_clippers.py

multihost: $(READY)
	$(BIN)/python examples/multihost.py

# Tests, linters and documentation share the cores; each must pass.
test: $(READY)
	@$(MAKE) --no-print-directory -j 2 pytest checks

# make pytest TESTS="tests/test_norms.py -x"
TESTS ?=
pytest: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

# Their output in one piece, as the tests go on printing.
checks: $(READY)
	@found=$$($(MAKE) --no-print-directory lint docs 2>&1); code=$$?; \
	  printf '\n%s\n' "$$found"; exit $$code

# Other random examples than those of `make test`, and many times as many. The first line says how
# to draw the same again; a failure also prints a decorator that reproduces it.
ifndef SEED
SEED := $(shell date +%s)
endif
TIMES ?= 50
explore: $(READY)
	@echo "make explore SEED=$(SEED) TIMES=$(TIMES)"
	EXPLORE=$(TIMES) $(BIN)/python -m pytest -n 2 --dist loadfile -m "hypothesis or fuzz" \
	  --hypothesis-seed=$(SEED) $(TESTS)

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

# By the compilers of accelerators, which need none: make bench-compiled COMPILED=--quick
COMPILED ?= --json docs/compiled_cost.json --markdown docs/compiled_cost.md
bench-compiled: $(READY) compilers
	$(BIN)/python benchmarks/compiled.py $(COMPILED)

compilers: .venv-tpu/.ready .venv-cuda12/.ready

# The extra of jax by that name, beside the very versions that are in .venv.
.venv-%/.ready: $(READY)
	$(PYTHON) -m venv --clear .venv-$*
	$(BIN)/python -m pip freeze --exclude-editable > .venv-$*/versions.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint .venv-$*/versions.txt 'jax[$*]' optax jax-privacy
	@touch $@

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

$(READY): pyproject.toml
	@[ ! -L .venv ] || { echo '.venv is a link, and another tree may need what it holds: bring it up' \
	  'to date there, or remove the link.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'Python >= 3.11 is needed; name one: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
