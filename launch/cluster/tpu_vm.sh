#!/usr/bin/env bash
# Runs the same command on every machine of a TPU pod (TPU VMs).
#
#   TPU=my-pod ZONE=us-east5-a launch/cluster/tpu_vm.sh \
#       --config=configs/bridge_video.py --workdir=/mnt/runs/bridge
#
# First make the pod, and put the code and the data on every machine (docs/clusters.md):
#
#   gcloud compute tpus queued-resources create my-pod --node-id=my-pod --zone=us-east5-a \
#       --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5
#
# For several slices, make the queued resource with --node-count=4 --node-prefix=my-pod, give its
# name as QUEUED instead of TPU, and add --config.mesh.data=4.
#
# If one machine fails, the others stop within a minute. The same command continues the run.

set -euo pipefail
: "${ZONE:?the zone of the pod}"
if [[ -n ${QUEUED:-} ]]; then
  pod=(queued-resources ssh "$QUEUED" --node=all)
else
  pod=(tpu-vm ssh "${TPU:?the name of the pod}")
fi
printf -v flags ' %q' "$@"
exec gcloud compute tpus "${pod[@]}" --zone="$ZONE" --worker=all \
  --command="cd ${FOLDER:-mvjax} && ${PYTHON:-.venv/bin/python} -m ${MODULE:-launch.train}$flags"
