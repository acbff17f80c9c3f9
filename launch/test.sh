#!/usr/bin/env bash
# The test suite with one command, set-up included: bash launch/test.sh [pytest's arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ensure_environment requirements-dev.txt
ensure_gl || say "going on: the tests that render are skipped or will fail"
cd "$root"
exec "$python" -m pytest ${1+"$@"}
