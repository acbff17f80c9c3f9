#!/usr/bin/env bash
# Runs launch.train in a pod of a JobSet, with an exit code that Kubernetes understands.
#
# A run that SIGTERM interrupted (a preemption, a drained node) has saved its step and exits with
# code 0, which a JobSet takes for the end of the work. This script exits with 143 instead until the
# last step is reached, so that the run is started again and continues.

set -uo pipefail
python=${PYTHON:-python}
if [[ ${MODULE:-launch.train} != launch.train ]]; then # others end with 0 only when they are done
  exec "$python" -m "$MODULE" "$@"
fi
for flag in "$@"; do
  case $flag in --workdir=*) workdir=${flag#*=} ;; esac
done
: "${workdir:?must be given as --workdir=FOLDER}"

trap 'kill -TERM "$!"' TERM # Kubernetes signals this process only
"$python" -m launch.train "$@" &
training=$!
wait "$training"
code=$?
if ((code > 128)); then # the trap ended `wait`, or a signal the training
  wait "$training"
  code=$?
fi
if ((code == 0)) && [[ ! -f $workdir/finished ]]; then
  code=143
fi
exit "$code"
