# make demo: installs everything into .venv and quantizes the bundled models.   make test: installs and runs all tests.
# make check: what to run while working: linters, types and the quick tests.
# Settings: PYTHON, TORCH (see requirements/install.sh), PYTEST_ARGS
VENV := .venv
LINT := .venv-lint
RUN := $(VENV)/bin/python

.PHONY: install demo test lint check clean

install:
	@requirements/install.sh $(VENV)

demo: install
	@$(RUN) demo/run.py

test: install
	@$(RUN) -m pytest $(PYTEST_ARGS)

lint:
	@requirements/lint.sh $(LINT)
	@$(LINT)/bin/ruff check .
	@$(LINT)/bin/ruff format --check --quiet . || { echo 'not formatted: run $(LINT)/bin/ruff format .' >&2; exit 1; }
	@$(LINT)/bin/mypy

check: lint install
	@$(RUN) -m pytest -m "not slow and not integration" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(LINT) demo/data work_dirs
