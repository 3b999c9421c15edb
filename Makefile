# Paths are relative and quoted, and tools run as `python -m`: the folder's name may have spaces.

# Version of the Python of .venv, the newest of these that is there unless PYTHON names another. For
# `make wheelhouse`, PYTHON is the version of the machine that the wheels are for.
PYTHON ?=
SUPPORTED := 3.13 3.12 3.11 3.10
VENV_PYTHON := $(or $(if $(filter wheelhouse,$(MAKECMDGOALS)),,$(PYTHON)),$(SUPPORTED))
SEEDS ?= 1
CONTROL ?=
ARGS ?=
EXCLUDE ?=

# Byte code is kept even where the environment forbids it: a hundred processes would compile anew.
PYTEST := PYTHONDONTWRITEBYTECODE= .venv/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadgroup
PIP_INSTALL := .venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt
SOURCES := projects tools tests docs setup.py

.PHONY: help demo test test-fast test-long test-faults bench-check lint docs wheelhouse clean installed
.DELETE_ON_ERROR:

help:
	@echo "make installed                   install everything into .venv"
	@echo "make demo [SEEDS=3] [CONTROL=1]  train a teacher, a student and its distillation; compare them"
	@echo "make test [ARGS='-k name']       run the tests (5 minutes on two cores)"
	@echo "make test-fast [ARGS=...]        without those that train or start processes (90 seconds)"
	@echo "make test-long [ARGS=...]        tutorials, the demo, networks that learn (2 minutes)"
	@echo "make test-faults [ARGS=...]      kill trainings, fill disks, damage files (8 minutes)"
	@echo "make bench-check                 compare what losses and steps cost with a table (2 minutes)"
	@echo "make lint                        check style and types"
	@echo "make docs                        build the documentation: site/index.html"
	@echo "make wheelhouse PYTHON=3.12 [EXCLUDE='torch nvidia']"
	@echo "                                 collect all wheels for a machine without network"
	@echo "make clean                       remove .venv, wheelhouse and caches; output stays"
	@echo "Each of these first installs what is missing into .venv, except wheelhouse and clean."
	@echo "PYTHON=3.12 names the version of .venv (default: the newest of $(SUPPORTED) that is there)."

demo: installed
	.venv/bin/python -m distill demo --seeds $(SEEDS) $(if $(filter-out 0,$(CONTROL)),--control)

test: installed
	$(PYTEST) -m "not long" $(ARGS)

test-fast: installed
	$(PYTEST) -m "not e2e and not slow" $(ARGS)

test-long: installed
	$(PYTEST) -m long $(ARGS)

test-faults: installed
	$(PYTEST) tests/faults $(ARGS)

# The ratios of steps and losses, beside those of a committed table. One thread is the steadiest.
bench-check: installed
	OMP_NUM_THREADS=1 .venv/bin/python -m distill benchmark --losses --batch 1 --repeats 9 \
	  --tolerance 0.8 --check docs/results/bounds_losses.json $(ARGS)
	OMP_NUM_THREADS=1 .venv/bin/python -m distill benchmark --size 96x128 --repeats 7 \
	  --config-file COCO-Detection/TID/retinanet_R_101_FPN-retinanet_R_50_FPN.yaml \
	  --heads FitNet PKD CWD FGD MKD IMA TID --check docs/results/bounds_steps.json $(ARGS) \
	  MODEL.DEVICE cpu

lint: installed
	.venv/bin/python -m ruff check $(SOURCES)
	.venv/bin/python -m ruff format --check $(SOURCES)
	.venv/bin/python -m mypy

docs: installed .venv/.docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

wheelhouse: .venv/bin/python
	$(PIP_INSTALL) --quiet setuptools packaging
	.venv/bin/python tools/make_wheelhouse.py $(addprefix --python ,$(PYTHON)) --exclude $(EXCLUDE)

clean:
	rm -rf .venv wheelhouse build site projects/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find projects tools tests docs -name __pycache__ -prune -exec rm -rf {} +

installed: .venv/.installed
	@[ -e .venv/bin/python$(PYTHON) ] || \
	  { echo ".venv is not of Python $(PYTHON): run \`make clean\` first." >&2; exit 1; }

# Whatever is installed already is not downloaded again, so this works without network then.
# setuptools comes first: it builds the sdists and this project, and that of a new venv is too old.
.venv/.installed: setup.py constraints.txt tools/install_detectron2.py | .venv/bin/python
	$(PIP_INSTALL) --quiet setuptools
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	.venv/bin/python tools/install_detectron2.py
	@touch $@

.venv/.docs: setup.py constraints.txt | installed
	$(PIP_INSTALL) --no-build-isolation --editable '.[docs]'
	@touch $@

# Each candidate is run, because pyenv has commands for versions that it does not offer.
.venv/bin/python:
	@for wanted in $(VENV_PYTHON); do \
	  for python in python$$wanted python3 python; do \
	    version=$$($$python -c 'import ensurepip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	    [ "$$version" = "$$wanted" ] && exec $$python -m venv .venv; \
	  done; \
	done; \
	echo "None of these versions of Python was found: $(VENV_PYTHON). Install one with its venv" \
	  "module." >&2; \
	exit 1
