#!/usr/bin/env bash
# Ten minutes on a GPU node that reaches no package index: checks, measures, trains.
#
#   SITE=/tmp/site examples/scripts/ten_minutes_gpu.sh [OUT] [--dry]
#
# SITE is a folder of unpacked packages, if the node's Python lacks any. OUT gets at most
# 8 files of at most 16 MiB, each as soon as it exists; after 9 minutes it is over.
set -euo pipefail

export PYTHONPATH="${SITE:+$SITE:}$PWD"
out=${1:-out}
[[ $# -eq 0 ]] || shift
work=${WORK:-$(mktemp -d)}

python -m experiments.gpu_minutes --workdir="$work" --files="$out" "$@"
