#!/usr/bin/env bash
# Run on every host: torchrun.sh FIRST_HOST NUM_HOSTS SCRIPT [ARGUMENTS...]
set -euo pipefail
first_host=$1 num_hosts=$2
shift 2
exec torchrun \
    --nnodes "$num_hosts" \
    --nproc-per-node "${RANKS_PER_HOST:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_host:29500" \
    --rdzv-id "${JOB_ID:-zgraph}" \
    "$@"
