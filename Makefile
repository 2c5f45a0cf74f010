# make quickstart: train a small MLRA-4 and decode from it.   make test: run the tests.
# make quickstart SOURCE=FILE trains on a text file, a folder of them or a .bin token file.

PYTHON ?= python3
SOURCE ?= pydoc
VENV := .venv
RUN := $(VENV)/bin/python

ifeq ($(SOURCE),pydoc)
WORKDIR ?= runs/quickstart
else
WORKDIR ?= runs/quickstart-$(basename $(notdir $(SOURCE:/=)))
endif
# Token files hold GPT-2's byte pairs; text is read as bytes.
ifeq ($(suffix $(SOURCE)),.bin)
TOKENS := --config.data.tokenizer=gpt2 --config.model.vocab_size=50304
endif

.PHONY: quickstart test lint clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/installed
	@$(RUN) train.py --config=configs/quickstart.py --workdir='$(WORKDIR)' \
		--config.data.source='$(SOURCE)' $(TOKENS)
	@echo
	@$(RUN) decode.py --checkpoint='$(WORKDIR)' --virtual_cpu_devices=4 --mesh=tensor=4 \
		--prompt='The ' --max_new_tokens=300 --temperature=0.7 --top_p=0.95

test: $(VENV)/installed
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet .
	@$(RUN) -m pytest -n 2

$(VENV)/installed: requirements.txt
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
	@touch $@

clean:
	rm -rf $(VENV) runs
