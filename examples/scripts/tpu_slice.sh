#!/usr/bin/env bash
# One run on a TPU slice of several hosts, such as a v4-32 (4 hosts of 4 chips).
#
#   TPU=NAME ZONE=us-central2-b examples/scripts/tpu_slice.sh setup
#   TPU=NAME ZONE=us-central2-b examples/scripts/tpu_slice.sh run
#
# on your own machine; `worker`, which it starts on every host, is the part that runs. The
# folder of the run must be on a disk that all hosts mount. The same command goes on.
set -euo pipefail

here=examples/scripts/tpu_slice.sh
folder=${FOLDER:-aps_jax}    # of the repository, on every host
shared=${SHARED:-/mnt/shared} # a disk that all hosts mount, such as Filestore's

on_every_host() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# Prints what the metadata server of a TPU host says.
metadata() {
  curl --silent --fail --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

worker() {
  source "${VENV:-.venv}/bin/activate"
  # A list with commas, of hosts or of name:id:host, as jax.distributed reads it too.
  IFS=, read -r -a hosts <<<"$(metadata worker-network-endpoints)"
  chips=$((${#hosts[@]} * ${CHIPS_PER_HOST:-4}))
  python -m experiments.run_aps --preset=gpu --require_accelerator --game=Pong \
    --coordinator_address="${hosts[0]##*:}:8476" --num_processes="${#hosts[@]}" \
    --process_id="$(metadata agent-worker-number)" --num_devices="$chips" \
    --batch_size=4096 --num_particles=4096 --num_envs=512 \
    --finetune_num_envs="$chips" --finetune_batch_size="$((4 * chips))" \
    --workdir="$shared/pong_on_tpu"
}

case ${1:-} in
  setup)
    on_every_host "git clone ${REPOSITORY:?the address of the repository} $folder &&
      cd $folder && python3 -m venv .venv && .venv/bin/pip install -e . 'jax[tpu]'"
    ;;
  run) on_every_host "cd $folder && bash $here worker" ;;
  worker) worker ;;
  *)
    echo "setup, run or worker, not '${1:-}'" >&2
    exit 2
    ;;
esac
