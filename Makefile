# make demo: installs everything into .venv and quantizes the bundled models.   make test: installs and runs the tests.
# Settings: PYTHON, TORCH (see requirements/install.sh), PYTEST_ARGS
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: install demo test lint clean

install:
	@requirements/install.sh $(VENV)

demo: install
	@$(RUN) demo/run.py

test: install
	@$(RUN) -m pytest $(PYTEST_ARGS)

lint: install
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) demo/data work_dirs
