# make quickstart: train a small MLRA-4 and decode from it.   make test: run the tests.
# make quickstart SOURCE=FILE trains on a text file, a folder of them or a .bin token file.
# make check: style, types and the tests that need no compiler, in seconds.   make check TESTS=DIR
# runs another folder's.   make mutants: do the tests notice planted faults?
# make docs: run the commands of README and docs on tiny sizes and build the site into build/site.
# make docs PAGES=docs/data.md runs those of a page alone.

PYTHON ?= python3
SOURCE ?= pydoc
VENV := .venv
RUN := $(VENV)/bin/python

ifeq ($(SOURCE),pydoc)
WORKDIR ?= runs/quickstart
PROMPT ?= When a class
else
PROMPT ?= The
WORKDIR ?= runs/quickstart-$(basename $(notdir $(SOURCE:/=)))
endif

# The tests of these compile nothing.
TESTS ?= tests/test_presets.py tests/test_house.py tests/test_mutants.py

.PHONY: quickstart test check lint mutants docs clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/installed
	@$(RUN) train.py --config='configs/quickstart.py:$(SOURCE)' --workdir='$(WORKDIR)'
	@echo
	@$(RUN) decode.py --checkpoint='$(WORKDIR)' --virtual_cpu_devices=4 --mesh=tensor=4 \
		--prompt='$(PROMPT) ' --max_new_tokens=240 --temperature=0.7 --top_p=0.8

test: lint
	@$(RUN) -m pytest -n 2 --dist worksteal --durations=20

check: lint
	@$(RUN) -m pytest -n 2 --dist worksteal $(TESTS)

lint: $(VENV)/installed
	@$(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(VENV)/bin/mypy

mutants: $(VENV)/installed
	@$(RUN) -m tests.mutants $(MUTANTS)

docs: $(VENV)/docs
	@$(RUN) -m tests.docs $(PAGES)
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build
	@echo 'The site is in build/site: open build/site/index.html'

# The extra's packages without the package itself.
$(VENV)/docs: $(VENV)/installed pyproject.toml
	@$(RUN) -m pip install --quiet --disable-pip-version-check $$($(RUN) -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["docs"])')
	@touch $@

$(VENV)/installed: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
		echo 'mlra_jax needs Python 3.12 or newer; $(PYTHON) is' \
		"$$($(PYTHON) --version 2>&1 || echo missing)." \
		'Install one and name it: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo '$(PYTHON) cannot make virtual environments; install its venv package' \
		'(Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
	@echo 'Installing into $(VENV) (a few minutes, once) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) runs build
