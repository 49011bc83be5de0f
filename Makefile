# `make demo` and `make test` need Python 3.11 or later and PyPI; everything they install goes into $(VENV).

VENV ?= .venv
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: demo test docs lint clean

demo: $(VENV)/.run
	$(VENV)/bin/python train.py --config configs/digits.py

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/mkdocs build --strict

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV) site

# One stamp for each set of requirements; pyproject.toml is what they are made from.
$(VENV)/.run: EXTRAS =
$(VENV)/.test: EXTRAS = [test]
$(VENV)/.docs: EXTRAS = [docs]
$(VENV)/.lint: EXTRAS = [dev,tensorboard]
$(VENV)/.run $(VENV)/.test $(VENV)/.docs $(VENV)/.lint: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.$(EXTRAS)'
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: https://www.python.org/downloads/"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
