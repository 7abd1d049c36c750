#!/usr/bin/env bash
# One run on one GPU: pretrains on a game, fine-tunes, evaluates.
#
#   examples/scripts/one_gpu.sh [GAME] [SEED]
#
# The same command goes on after Ctrl-C, a crash or a restart of the machine.
set -euo pipefail

game=${1:-Pong}
seed=${2:-0}
# A virtual environment with `pip install -e . 'jax[cuda13]'`.
source "${VENV:-.venv}/bin/activate"

run=(python -m experiments.run_aps --preset=gpu --require_accelerator
  --game="$game" --seed="$seed" --workdir="runs/$game/seed_$seed")

"${run[@]}" --preflight # Is there room, and how many hours will it take?
"${run[@]}"
