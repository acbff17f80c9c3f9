#!/usr/bin/env bash
# Starts a run on a GKE cluster with xpk, which writes a JobSet such as gke_jobset.yaml by itself.
#
#   CLUSTER=my-cluster NAME=bridge-1 TPU_TYPE=v5p-128 SLICES=2 IMAGE=my-image \
#       launch/cluster/xpk.sh --config=configs/bridge_video.py --config.mesh.data=2 \
#       --workdir=/mnt/runs/bridge
#
# IMAGE is a container image with this repository as its working folder. --workdir is on storage that
# is attached to the cluster (docs/clusters.md). Project and zone are those of `gcloud config`.

set -euo pipefail
: "${CLUSTER:?the name of the GKE cluster}" "${NAME:?a new name for the workload}"
: "${TPU_TYPE:?the slice, such as v5p-128}" "${IMAGE:?the container image}"
printf -v flags ' %q' "$@"
exec xpk workload create --cluster="$CLUSTER" --workload="$NAME" --docker-image="$IMAGE" \
  --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" --max-restarts="${RESTARTS:-10}" \
  --termination-grace-period-seconds=300 \
  --command="MODULE=${MODULE:-launch.train} launch/cluster/pod.sh$flags"
