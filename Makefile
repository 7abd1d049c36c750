# Two commands on a fresh machine that has Python 3.11 or newer and make:
#   make demo    the main job on real Atari, about seven minutes on two cores, installation with it
#   make test    all tests, about 13 minutes on two cores
# and, for those who change what a run survives:
#   make test-faults    kills real processes, and watches a long run's memory
# and, for those who change what runs on accelerators:
#   make test-described    compiles for a TPU that is not there
# and, for those who change what a page says:
#   make docs    the documentation, in docs/_build/html; any warning is an error
#   make pages   the tables in README.md and docs/ that code and results make
#   make results    measures the README's table anew: about an hour on two cores
#   make atari100k    holds known agents to their published scores: a day on two cores

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-faults test-described docs pages results atari100k lint format clean

demo: $(VENV)/installed
	$(BIN)/python -m experiments.pretrain --game=Pong --preset=cpu --workdir=runs/demo/pretrain
	$(BIN)/python -m experiments.evaluate --checkpoint=runs/demo/pretrain --workdir=runs/demo/told \
	  --reward=examples.rewards:pong_high,examples.rewards:pong_low --video

test: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest

# The settings of pyproject.toml leave these tests out.
test-faults: $(VENV)/installed
	$(BIN)/python -m pytest --override-ini addopts= -n 2 --dist worksteal -v tests/faults

test-described: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[tpu]'
	$(BIN)/python -m pytest --override-ini addopts= -v tests/described

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

pages: $(VENV)/installed
	$(BIN)/python -m experiments.pages

# Three games, three seeds, both arms; then one pretrained agent on several rewards,
# and fine-tuned for one of them.
SWEEP := $(BIN)/python -m experiments.sweep --run=local --workdir=runs/cpu_sweep \
  --keep=results/cpu_sweep --preset=cpu --pretrain_frames=128000 \
  --finetune_samples_per_step=16
results: $(VENV)/installed
	$(SWEEP) --seeds=3 --games=Pong,MsPacman,RoadRunner
	$(SWEEP) --seeds=3 --stage=rewards --games=Pong --reward=score,survival,examples.rewards:pong_high
	$(SWEEP) --seeds=3 --stage=rewards --games=MsPacman --reward=score,survival,examples.rewards:pacman_left
	$(SWEEP) --seeds=3 --stage=rewards --games=RoadRunner --reward=score,survival
	$(SWEEP) --seeds=1 --stage=finetune --games=Pong --reward=examples.rewards:pong_high
	$(SWEEP) --seeds=3 --stage=finetune --games=MsPacman --reward=examples.rewards:pacman_left
	$(SWEEP) --seeds=3 --stage=finetune --games=RoadRunner --reward=survival
	$(BIN)/python -m experiments.pages

# 13 runs, one after the other; the same command goes on.
ATARI100K := $(BIN)/python -m experiments.sweep --run=local --processes=1 \
  --stage=scratch --preset=atari100k --workdir=runs/atari100k --keep=results/atari100k
atari100k: $(VENV)/installed
	$(ATARI100K) --agents=curl --games=Breakout,CrazyClimber,RoadRunner --seeds=3
	$(ATARI100K) --agents=drq_eps --games=Boxing --seeds=2
	$(ATARI100K) --agents=der --games=CrazyClimber --seeds=2
	$(BIN)/python -m experiments.pages

lint: $(VENV)/installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

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
