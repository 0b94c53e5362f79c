# `make` lists the targets. Everything runs in .venv, which `make setup` creates with $(PYTHON).

PYTHON ?= python3
ARGS ?=

VENV := .venv
# As the package sets it, for tools that import torch before it.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
BUSY := $(VENV)/.busy
DEMO := output/demo
DOCS := output/docs

.PHONY: help setup demo test test-all bench lint format types docs audit clean

help:
	@echo "make setup    create .venv with everything that the demo and the tests need"
	@echo "make demo     train and evaluate on the built-in shapes, leave pictures in $(DEMO)"
	@echo "make test     run the tests but the slow ones; make test ARGS='-k shapes' runs some of them"
	@echo "make test-all run all tests, among them those that kill, resume and compare whole trainings"
	@echo "make bench    measure speed and memory, rewrite results/performance_* and their tables"
	@echo "make lint     check the code with ruff;  make format  rewrites it"
	@echo "make audit    look the pinned packages up among the known vulnerabilities (needs the network)"
	@echo "make types    check the types of the package with pyright"
	@echo "make docs     build docs/ as HTML, with the API reference, as $(DOCS)/docs/index.html"
	@echo "make clean    remove .venv, caches and the demo's output"
	@echo "PYTHON=python3.12 chooses the interpreter (now: $(PYTHON))"

setup: $(READY)

# .ready exists only after a complete set-up. .busy is there while one runs: when it is found, the
# last one was killed, may have left half a package behind, and the environment is made anew. After
# a step that merely failed (no network, say) the environment is sound and is built upon.
$(READY): pyproject.toml requirements/locked.txt requirements/unresolved.txt \
		tools/install_detectron2.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("contrast_d2: the pinned \
	packages need Python 3.11 or newer and %s is %d.%d; choose another with make PYTHON=..." \
	% ((sys.executable,) + sys.version_info[:2]))'
	@echo "setting up $(VENV): some minutes the first time, torch and its CUDA libraries are large"
	@rm -f $(READY)
	@if [ -e $(BUSY) ]; then clear=--clear; fi; \
	mkdir -p $(VENV) && touch $(BUSY) && \
	{ $(PYTHON) -m venv $$clear $(VENV) && touch $(BUSY) && \
	  $(PIP) install --require-hashes -r requirements/locked.txt && \
	  $(PIP) install --require-hashes --no-deps -r requirements/unresolved.txt && \
	  $(PIP) install --no-deps --no-build-isolation -e . && \
	  $(BIN)/python tools/install_detectron2.py; \
	  status=$$?; rm -f $(BUSY); exit $$status; }
	@touch $(READY)

demo: $(READY)
	$(BIN)/python train_net.py --config-file configs/shapes/semfpn_r18_ms_cs_demo.py \
	    train.output_dir=$(DEMO)
	$(BIN)/python tools/plot_run.py $(DEMO)

# Tests of a file run in one process, in order: some share a training.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# On a machine that does nothing else; about half an hour. Broken promises are told at the end.
bench: $(READY)
	$(BIN)/python tools/benchmark.py growth --output results/performance_growth.json
	$(BIN)/python tools/benchmark.py projection --output results/performance_projection.json
	$(BIN)/python tools/benchmark.py data --output results/performance_data.json
	$(BIN)/python tools/benchmark.py contrast --check --large --output results/performance_cpu.json; \
	status=$$?; $(BIN)/python tools/benchmark.py tables && exit $$status

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Its own environment: what audits is not among what is audited.
audit:
	@[ -x .audit/bin/pip-audit ] || { $(PYTHON) -m venv .audit && .audit/bin/pip install -q pip-audit; }
	.audit/bin/pip-audit --no-deps --disable-pip --strict -r requirements/pinned.txt

types: $(READY)
	$(BIN)/basedpyright

# Warnings, such as a link to nowhere, are errors; -E reads all pages anew.
docs: $(READY)
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html -c docs . $(DOCS)

clean:
	rm -rf $(VENV) .audit $(DEMO) $(DOCS) build *.egg-info .pytest_cache .ruff_cache
