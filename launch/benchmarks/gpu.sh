#!/usr/bin/env bash
# Measures everything of interest on one GPU in eight minutes, without a network:
#
#   bash launch/benchmarks/gpu.sh [--wheels=DIR] [--rehearse] [--out=gpu.json] [...]
#
# The Python of the machine (PYTHON=..., else that of .venv, else python3) needs JAX and PyTorch with
# their CUDA libraries. Other packages that it lacks come as wheels in DIR (docs/performance.md lists
# them). They are installed into a temporary folder: the packages of the machine do not change. Other
# flags go to `python -m launch.benchmarks.gpu`.
set -euo pipefail
began=$SECONDS
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
wheels="" words=()
for word in ${1+"$@"}; do
  case "$word" in
    --wheels=*) wheels="${word#--wheels=}" ;;
    --wheels) echo "gpu.sh: give the folder as --wheels=DIR." >&2; exit 2 ;;
    *) words+=("$word") ;;
  esac
done
python="${PYTHON:-$root/.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3

packages="$(mktemp -d)"
trap 'rm -rf "$packages"' EXIT
if [ -n "$wheels" ]; then
  # Only what the machine does not have: another numpy could break its PyTorch.
  missing="$("$python" - "$wheels" <<'PYTHON'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

wheels = sorted(Path(sys.argv[1]).glob("*.whl"))
if not wheels:
    sys.exit(f"gpu.sh: there are no wheels in {sys.argv[1]}.")
for wheel in wheels:
    try:
        version(wheel.name.split("-")[0])
    except PackageNotFoundError:
        print(wheel)
PYTHON
)"
  if [ -n "$missing" ]; then
    printf '%s\n' "$missing" >"$packages/wheels.txt"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
      --disable-pip-version-check --root-user-action=ignore \
      --target "$packages/site" -r "$packages/wheels.txt"
  fi
fi
export PYTHONPATH="$packages/site:$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m launch.benchmarks.gpu "--spent=$((SECONDS - began))" ${words[@]+"${words[@]}"}
