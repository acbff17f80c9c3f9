#!/usr/bin/env bash
# The whole quickstart with one command, including set-up: bash launch/quickstart.sh [--study] [...]
# All flags go to `python -m launch.quickstart`. Paths in flags are relative to the repository.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ensure_environment requirements.txt
ensure_gl || exit 2
cd "$root"
# Memory in pages of 2 MB, where Linux has them: a training step on a CPU takes a quarter less time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec "$python" -m launch.quickstart ${1+"$@"}
