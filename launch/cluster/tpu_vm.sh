#!/usr/bin/env bash
# Runs the same command on every machine of a TPU pod (TPU VMs, one or several slices).
#
#   TPU=my-pod ZONE=us-east5-a launch/cluster/tpu_vm.sh \
#       --config=configs/bridge_video.py --workdir=/mnt/runs/bridge
#
# Make the pod first, and put the code and the data on every machine (docs/clusters.md):
#
#   gcloud compute tpus queued-resources create my-pod --node-id=my-pod --zone=us-east5-a \
#       --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5
#
# If one machine fails, the others stop within a minute; the same line continues the run.

set -euo pipefail
: "${TPU:?the name of the pod}" "${ZONE:?its zone}"
printf -v flags ' %q' "$@"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ${FOLDER:-mvjax} && ${PYTHON:-.venv/bin/python} -m launch.train$flags"
