# `make play` and `make test` need Python 3.11 or later, git and make; all else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt

.PHONY: play test test-full soak lint docs clean

play: $(VENV)/.installed-play
	$(VENV)/bin/kvjax play

test: lint
	$(VENV)/bin/python -m pytest -m "not optimised"
	KVJAX_OPTIMISED=1 $(VENV)/bin/python -m pytest -m optimised `grep -rl mark.optimised tests`

# Everything as users run it, optimised, and with more examples: an hour.
test-full: lint
	KVJAX_FULL=1 $(VENV)/bin/python -m pytest

# A million simulations with restarts, new weights, evictions, files: some minutes.
soak: $(VENV)/.installed-play
	$(VENV)/bin/python examples/soak.py

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The pages of docs/ as a site in .site; a broken link or an unknown name is an error.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --quiet
	@echo "look at it: $(VENV)/bin/python -m http.server --directory .site 8000"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"kvjax needs Python 3.11 or later, got {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-play: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing kvjax into $(VENV) (a minute or two, once)"
	$(PIP) -e '.[gif,train]'
	@touch $@

# torch comes first and pinned, so that no other package chooses a build of it.
$(VENV)/.installed-test: $(VENV)/.installed-play
	@echo "installing what the tests need into $(VENV) (torch and LightZero among it, once)"
	$(PIP) torch==2.13.0
	$(PIP) -e '.[gif,atari,box2d,test,torch,lightzero]'
	$(PIP) --no-deps lightzero DI-engine DI-treetensor DI-toolkit
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed-play
	$(PIP) -e '.[gif,docs]'
	@touch $@

clean:
	rm -rf $(VENV) .site
