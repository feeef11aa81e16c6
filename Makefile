# Everything that is made here. `make help` lists the targets. Works with GNU make 3.81 and later, and with -j.

PROFILE ?= tiny
PYTHON  ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
             $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

VENV  := .venv
PY    := $(VENV)/bin/python
ENV   := $(VENV)/.installed
# A profile may be the path of a file, whose folder and name may have spaces.
BUILD := build/$(shell basename "$(PROFILE)" .yaml | tr ' ' '_')

NOTEBOOKS := $(sort $(wildcard notebooks/[0-9]*.ipynb notebooks/explore.ipynb))
BEYOND    := $(sort $(wildcard notebooks/beyond/[0-9]*.ipynb))
EVERY     := $(NOTEBOOKS) $(BEYOND)
BUILT     := $(NOTEBOOKS:notebooks/%.ipynb=$(BUILD)/%.ipynb)
BEYOND_BUILT := $(BEYOND:notebooks/%.ipynb=$(BUILD)/%.ipynb)
built = $(foreach number,$(1),$(filter $(BUILD)/$(number)_%,$(BUILT)))
CODE      := $(wildcard nemolib/*.py nemolib/*/*.py nemolib/paper/*.csv nemolib/profiles/*.yaml nemolib/templates/*.html)
INPUTS    := $(wildcard data/tiny/prompts/*.csv data/tiny/*/model_index.json data/tiny/*/*.safetensors data/tiny/*/*/*.safetensors)

# What notebooks keep in git: outputs and counts; not how and when papermill ran them.
STRIP := $(VENV)/bin/nbstripout --keep-output --keep-count --keep-id \
         --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution"

export PROFILE

# So many notebooks run at once, each on its share of the cores: two do more than one after another on all cores. With a GPU, or
# with workers, they take turns (tools/runner.py).
JOBS ?= 2
ifeq ($(MAKELEVEL)$(filter -j% --jobserver%,$(MAKEFLAGS)),0)
MAKEFLAGS += --jobs=$(JOBS)
endif
CORES   := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
THREADS := $(or $(OMP_NUM_THREADS),$(shell echo $$(( ($(CORES) + $(JOBS) - 1) / $(JOBS) ))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help env lab all notebooks figures explore beyond data estimate check-gpu published results-full site readme test lint train student refresh lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PROFILE=$(PROFILE) (choose another: make all PROFILE=tiny-full)"

env: $(ENV) ## create .venv with the versions of requirements.lock

$(ENV): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed, and none was found; give one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with the versions of requirements.lock (some minutes)"
	test -x $(PY) || "$(PYTHON)" -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# From the root, so that links from notebooks to docs/ and README.md open; docs/jupyter says: as pages, not as source.
lab: $(ENV) ## open JupyterLab on the notebooks
	JUPYTER_PATH="$(abspath $(VENV))/share/jupyter$${JUPYTER_PATH:+:$$JUPYTER_PATH}" JUPYTER_CONFIG_PATH="$(abspath docs/jupyter)$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	  $(VENV)/bin/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks

all: notebooks figures ## run every notebook, make every figure and table

# In this order two at once end soonest: 05 takes longest, and needs 03.
notebooks: $(call built,01 03 02 05) $(BUILT) ## run every notebook into build/PROFILE/

# A failed notebook leaves its output as .partial.ipynb, to look at, and never as finished.
$(BUILD)/%.ipynb: notebooks/%.ipynb $(CODE) $(INPUTS) $(ENV)
	@mkdir -p $(@D)
	OMP_NUM_THREADS=$(THREADS) $(PY) -m tools.runner --profile "$(PROFILE)" $< $(@:.ipynb=.partial.ipynb)
	@mv $(@:.ipynb=.partial.ipynb) $@

# Which notebook uses what another one computes, by their numbers; 03 computes the threshold rather than wait for 01. The first
# name stands for none: a rule needs a target.
.none $(call built,02): $(call built,01)
.none $(call built,04 05): $(call built,03)
.none $(call built,06): $(call built,01 02 03 04 05)
.none $(filter %/explore.ipynb,$(BUILT)): $(call built,03)
.none $(BEYOND_BUILT): $(call built,02 03)

figures: $(call built,06) ## make the figures and tables of the paper into figures/PROFILE/
	@echo "figures and tables: figures/$(notdir $(BUILD))/"

explore: $(BUILD)/explore.ipynb ## make figures/PROFILE/explore.html, a page to move neurons by hand without Python
	@echo "open in a browser: figures/$(notdir $(BUILD))/explore.html"

beyond: $(BEYOND_BUILT) ## run the notebooks on methods after NeMo: repaired models, attacks, detectors, region maps

data: $(ENV) ## fetch what a profile needs and the repository does not hold (PROFILE=sd14: gigabytes)
	$(PY) -m tools.fetch_data --profile "$(PROFILE)"

estimate: $(ENV) ## what a profile costs on this machine: UNet evaluations and hours of each stage
	$(PY) -m tools.estimate --profile "$(PROFILE)"

check-gpu: $(ENV) ## what this machine's GPU does: speed, memory, the same results as a CPU (minutes, no download)
	$(PY) -m tools.check_gpu

published: $(ENV) ## draw a published run beside the paper: make published PROFILE=sd14 RUN=results.csv
	@test -n "$(RUN)" || { echo "which results? make published PROFILE=sd14 RUN=results.csv" >&2; exit 1; }
	@mkdir -p $(BUILD)
	$(PY) -m tools.runner --profile "$(PROFILE)" -p "published_run=$(RUN)" notebooks/06_figures.ipynb $(BUILD)/published.ipynb

results-full: $(ENV) ## keep the tables of a finished run of tiny-full in data/tiny/results_full/
	$(PY) -m tools.results_full --profile tiny-full

site: $(ENV) ## make the site of notebooks, figures and docs into build/site/ (nothing is executed; works without a network)
	$(PY) -m sphinx --fresh-env --quiet --fail-on-warning --keep-going --conf-dir docs . build/site
	@echo "the site: build/site/index.html"

readme: $(ENV) ## write the table of claims, and what the data say of the tiny world, into README.md
	$(PY) -m tools.readme

# Notebooks that were not run yet run first, two at a time: under pytest they take turns, each needing what others computed.
test: $(ENV) ## run all tests, the notebooks among them, on two cores
	-$(MAKE) --no-print-directory PROFILE=tiny all beyond
	OMP_NUM_THREADS=1 $(PY) -m pytest tests notebooks -n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-sanitize-with tests/notebooks/sanitize.cfg

lint: $(ENV) ## check style and format, of the notebooks too
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(if $(EVERY),$(STRIP) --verify $(EVERY))

train: $(ENV) ## train the tiny world from the package data (hours; make all never needs it)
	$(PY) -m tools.world

# They lie one folder deeper than notebooks/, and so do their links to what is not a notebook.
student: $(ENV) ## notebooks without outputs and solutions into build/student/
	@for notebook in $(EVERY:notebooks/%=%); do \
	  mkdir -p $$(dirname build/student/$$notebook) && \
	  $(VENV)/bin/nbstripout --keep-id --drop-tagged-cells=solution --textconv notebooks/$$notebook \
	    > build/student/.partial && \
	  sed -E 's#\.\./(README\.md|docs/|examples/)#../../\1#g' build/student/.partial > build/student/$$notebook || exit 1; \
	done
	@rm build/student/.partial
	@echo "notebooks for students: build/student/"

refresh: ## run every notebook, then again at its defaults, and keep its outputs in notebooks/
	$(MAKE) --no-print-directory PROFILE=tiny all beyond
	$(MAKE) --no-print-directory $(patsubst %.ipynb,refresh-%,$(notdir $(EVERY)))

refresh-%: $(ENV)
	@mkdir -p build/refresh
	env -u PROFILE OMP_NUM_THREADS=$(THREADS) $(PY) -m tools.runner $(filter %/$*.ipynb,$(EVERY)) build/refresh/$*.ipynb
	$(STRIP) build/refresh/$*.ipynb
	@mv build/refresh/$*.ipynb $(filter %/$*.ipynb,$(EVERY))

# Not after $(ENV): that would put back the versions of the lock file first.
lock: ## write requirements.lock from what .venv holds (to upgrade: .venv/bin/pip install -U NAME, then this)
	$(PY) -m tools.lock > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

clean: ## remove what runs wrote: build/ and caches; figures/ and .venv stay
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find nemolib tests tools notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
