#!/usr/bin/env bash
# Makes the environment in which LIBERO's simulators run: bash launch/libero.sh
#
# Evaluation and recording find the environment by themselves. You may set:
#   MVJAX_LIBERO_VENV=/path/to/folder   the folder of the environment, instead of .venv-libero in the
#                                       repository; then also set
#                                       MVJAX_LIBERO_PYTHON=/path/to/folder/bin/python
#   PYTHON=/path/to/python3.11          the interpreter, a Python 3.11 or 3.12
#   MVJAX_LIBERO_ASSETS=/path           the folder `assets` of LIBERO's repository; without it, the
#                                       assets are downloaded when a simulator starts the first time
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export MVJAX_VENV="${MVJAX_LIBERO_VENV:-$here/../.venv-libero}"
# shellcheck source=launch/setup.sh
. "$here/setup.sh"
newest_minor=12  # numpy 1.26 has no builds for Python 3.13
libero="hf-libero==0.1.4"

ensure_environment requirements-libero.txt
if ! "$python" -c 'import importlib.metadata as m; m.version("hf-libero")' 2>/dev/null; then
  install_packages --no-deps "$libero" || fail "$libero could not be installed: see above."
fi
ensure_gl
say "starting a simulator to check that it works"
(cd "$root" && "$python" -c '
from mvjax.evaluation.suites.libero import Libero
simulator = Libero("spatial-0")
simulator.reset(0)
simulator.render("agentview")
simulator.close()
') || fail "LIBERO is installed, but does not start: see the last line above."
say "LIBERO works; its Python is $python"
