#!/usr/bin/env bash
# The eight GPUs of one machine, in one of two ways:
#
#   examples/scripts/eight_gpus.sh runs    eight runs at a time, each on a GPU of its own
#   examples/scripts/eight_gpus.sh one     one run on all eight
#
# The first is for studies (games x seeds), and wastes nothing. The second is for a run
# that is too slow or too large for one GPU. The same command goes on.
set -euo pipefail

# A virtual environment with `pip install -e . 'jax[cuda13]'`.
source "${VENV:-.venv}/bin/activate"

case ${1:-runs} in
  runs)
    # Cores of the machine / 8 for the emulators of each run.
    python -m experiments.sweep --run=local --games=atari26 --seeds=5 --preset=gpu \
      --processes=8 --env_threads=16 --workdir=runs/atari26
    ;;
  one)
    # Batch and particles are those of all devices together: four times the preset's. A
    # larger batch makes fewer updates of the same frames (docs/scaling.md), and the
    # learning rate that suits it is for you to find.
    run=(python -m experiments.run_aps --preset=gpu --require_accelerator --game=Pong
      --num_devices=8 --batch_size=4096 --num_particles=4096 --num_envs=512
      --workdir=runs/pong_on_eight)
    "${run[@]}" --preflight
    "${run[@]}"
    ;;
  *)
    echo "runs or one, not $1" >&2
    exit 2
    ;;
esac
