# Three environments are made on demand, each once and again when pyproject.toml, constraints.txt or requirements-peers.txt changes:
#   .venv          the newest supported transformers    .venv-oldest   the oldest
#   .venv-peers    kvpress, which needs an older one yet, and nothing of this package
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
OLDEST := transformers==5.17.0
BIN := .venv/bin
OLDEST_BIN := .venv-oldest/bin
SOURCES := src tests docs $(wildcard examples)
PARALLEL := --numprocesses 2 --dist loadfile  # models of tests are tiny: two processes of one thread each

export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP_INSTALL := -m pip install -qq --no-input --constraint constraints.txt

.PHONY: help demo test test-oldest test-ray peers test-peers check lint fix docs clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

demo: .venv/.installed-default ## set up .venv, then compress a whole book and ask about it (beacon demo)
	$(BIN)/beacon demo

test: .venv/.installed-dev ## set up .venv, then run all tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not peers"

test-oldest: .venv-oldest/.installed-dev ## run the tests on the oldest supported transformers, without the default model
	$(OLDEST_BIN)/python -m pytest $(PARALLEL) -m "not default_model and not peers"

test-ray: .venv/.installed-dev .venv/.installed-ray ## run the tests that need Ray (a minute; 200 MB more in .venv)
	$(BIN)/python -m pytest tests/test_server_ray.py

peers: .venv-peers/.installed-peers ## set up .venv-peers with kvpress, for its methods in beacon eval and bench speed (1.4 GB)

test-peers: .venv/.installed-dev .venv-peers/.installed-peers ## run the tests that need kvpress (a minute)
	$(BIN)/python -m pytest -m peers

check: lint test ## format, lint, types, generated docs, tests

lint: .venv/.installed-dev ## check format, lint, types and generated docs, changing nothing
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/python docs/generate_cli.py --check
	$(BIN)/python docs/generate_results.py --check

fix: .venv/.installed-dev ## format, and repair what the linter can
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

docs: .venv/.installed-dev ## write docs/cli.md anew from the program, docs/results.md from the stored results
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_results.py

clean: ## remove the environments, caches and builds
	rm -rf .venv .venv-oldest .venv-peers build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and on its own: it is by far the largest part, and the pin keeps a resolver from choosing another build.
.venv/.installed-torch .venv-oldest/.installed-torch .venv-peers/.installed-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "[setup] $(@D): creating the environment and installing torch (some minutes, once)"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python $(PIP_INSTALL) torch
	@touch $@

.venv/.installed-%: .venv/.installed-torch pyproject.toml
	@echo "[setup] .venv: installing activation-beacon[$*]"
	@.venv/bin/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

.venv-oldest/.installed-dev: .venv-oldest/.installed-torch pyproject.toml
	@echo "[setup] .venv-oldest: installing activation-beacon[dev] with $(OLDEST)"
	@.venv-oldest/bin/python $(PIP_INSTALL) '$(OLDEST)' --editable '.[dev]'
	@touch $@

.venv-peers/.installed-peers: .venv-peers/.installed-torch requirements-peers.txt
	@echo "[setup] .venv-peers: installing kvpress"
	@.venv-peers/bin/python $(PIP_INSTALL) --requirement requirements-peers.txt
	@touch $@
