#!/usr/bin/env bash
# The test suite with one command, including set-up: bash launch/test.sh [arguments of pytest]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

ensure_environment requirements-dev.txt
ensure_gl || say "continuing: tests that render will be skipped or will fail"
cd "$root"
exec "$python" -m pytest ${1+"$@"}
