# Two commands on a fresh machine that has Python 3.11 or newer and make:
#   make demo    the main job on real Atari, a few minutes on two cores
#   make test    all tests, at most ten minutes on two cores
# and, for those who change what a run survives:
#   make test-faults    kills real processes, and watches a long run's memory
# and, for those who change what a page says:
#   make docs    the documentation, in docs/_build/html; any warning is an error
#   make pages   the tables in README.md and docs/ that code and results make

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults docs pages lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.run_aps --game=Pong --preset=cpu --workdir=runs/demo

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pytest

# The settings of pyproject.toml leave these tests out.
test-faults: $(VENV)/installed
	$(BIN)/python -m pytest --override-ini addopts= -n 2 --dist worksteal -v tests/faults

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

pages: $(VENV)/installed
	$(BIN)/python -m experiments.pages

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .

format: $(VENV)/installed
	$(BIN)/python -m ruff format .

$(VENV)/installed: setup.py requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; give one by PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
