# Set-up shared by quickstart.sh, test.sh, libero.sh and .ci/run. They source it; it is never run by
# itself. It leaves its caller in the folder of the repository.
#
#   ensure_environment requirements.txt    makes or repairs .venv and sets $python to its Python
#   ensure_gl                              finds (or installs) off-screen OpenGL, exports MUJOCO_GL
#
# You may set:
#   PYTHON=/path/to/python3.12    the interpreter, instead of the newest one that runs
#   MVJAX_VENV=/path/to/folder    the folder of the environment, instead of .venv in the repository
#   MUJOCO_GL=egl|osmesa          the renderer, instead of the first one that works
#
# Works with the bash 3.2 of macOS: no associative arrays, no empty arrays under `set -u`.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MVJAX_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
export MVJAX_VENV="$venv"
case "${PYTHON:-}" in /*) ;; */*) PYTHON="$PWD/$PYTHON" ;; esac
cd "$root" || exit 2  # `-e .` in a requirements file means the current folder
python="$venv/bin/python"
made_here="$venv/.made-by-mvjax"   # only an environment with this file is ever removed
half_done="$venv/.half-installed"  # holds the installing process's id while it works
newest_minor=13  # MuJoCo 3.3.0, which Meta-World pins, has no builds for Python 3.14
gl_packages="libegl1 libgl1 libgl1-mesa-dri"  # newer systems have no libosmesa6 any more

# Packages of other Pythons (a sourced ROS workspace sets this) must not leak into ours.
unset PYTHONPATH PYTHONHOME

say() { printf 'mvjax: %s\n' "$*" >&2; }
fail() { say "$@"; exit 2; }
have_uv() { uv --version >/dev/null 2>&1; }

# Installs Debian packages if that takes no password.
apt_install() {
  local as_root=""
  if [ "$(id -u)" != 0 ]; then as_root="sudo -n"; fi
  if ! command -v apt-get >/dev/null 2>&1 || ! $as_root true 2>/dev/null; then return 1; fi
  say "installing $* with apt-get"
  # A failed update (one mirror cannot be reached) need not hinder the installation.
  $as_root apt-get update -qq >/dev/null 2>&1 </dev/null || true
  $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null </dev/null
}

# Prints "MINOR VERSION PATH" of a Python that runs (a version manager's shim may exist and fail);
# MINOR is 0 for what is no CPython 3.
probe_python() {
  "$1" -c 'import sys; v = sys.version_info
ours = v[0] == 3 and sys.implementation.name == "cpython"
print("%d %d.%d.%d %s" % (ours and v[1], v[0], v[1], v[2], sys.executable))' 2>/dev/null </dev/null
}

is_supported() { [ "${1:-0}" -ge 11 ] && [ "$1" -le $newest_minor ]; }

# Prints the path of the newest supported interpreter that runs; says what is wrong if none does.
choose_python() {
  local best=0 best_path="" found="" candidate minor version path
  set -- python3.13 python3.12 python3.11 python3 "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; fi
  for candidate in "$@"; do
    read -r minor version path <<<"$(probe_python "$candidate")"
    case "$path:$found" in :* | *"($path)"*) continue ;; esac
    found="${found:+$found, }$version ($path)"
    if is_supported "$minor" && [ "$minor" -gt "$best" ]; then best="$minor" best_path="$path"; fi
  done
  if [ "$best" = 0 ] && [ -z "${PYTHON:-}" ] && have_uv; then  # uv can bring one
    best_path="$(uv python install 3.12 >/dev/null 2>&1 && uv python find 3.12)" || best_path=""
  elif [ "$best" != 0 ] && ! have_uv && ! "$best_path" -c 'import ensurepip' >/dev/null 2>&1; then
    apt_install "python3.$best-venv" ||  # Debian has a package of its own for it
      fail "$best_path cannot make environments (its venv module is missing)." \
        "Run 'sudo apt-get install -y python3.$best-venv', then run this again."
  fi
  if [ -z "$best_path" ]; then
    found="${found:-none that runs${PYTHON:+ (PYTHON=$PYTHON)}}"
    fail "mvjax needs Python 3.11 or newer (up to 3.$newest_minor); found: $found." \
      "Install Python 3.12, or set PYTHON=/path/to/python3.12."
  fi
  printf '%s\n' "$best_path"
}

# True for an environment that can be kept and added to: its Python is supported, and PYTHON's if set.
is_usable() {
  local minor origin='import sys; print(sys.version_info[:2], sys.base_prefix)'
  read -r minor _ <<<"$(probe_python "$python")"
  is_supported "$minor" || return 1
  [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" -c "$origin" 2>/dev/null)" = "$("$python" -c "$origin")" ]
}

# What an environment was made from: the requirements file and, where that names this project, the
# project's place and packages (what stands before ruff's settings in pyproject.toml).
stamp_text() {
  cat "$1"
  case "$(cat "$1")" in *"-e ."*) pwd; sed '/^\[tool\.ruff/,$d' pyproject.toml ;; esac
}

# Makes an empty environment, in place of one that this script made earlier.
make_environment() {
  local base
  if [ -e "$venv" ] && [ ! -f "$made_here" ] && [ -n "$(ls -A "$venv")" ]; then
    fail "$venv was not made by this script and does not hold a Python that it can use." \
      "Remove it, or set MVJAX_VENV to another folder."
  fi
  base="$(choose_python)" || exit 2
  rm -rf "$venv"
  mkdir -p "$venv" || fail "cannot make the folder $venv: set MVJAX_VENV to another one."
  : >"$made_here"
  say "making $venv with $("$base" -V 2>&1) ($base)"
  "$base" -m venv --without-pip "$venv" >"$venv/install.log" 2>&1 ||
    fail "$base could not make an environment: $(tail -n 1 "$venv/install.log")"
}

# Installs what the words for pip name into the environment of $python.
install_packages() {
  if have_uv; then
    uv pip install --python "$python" "$@" </dev/null && return 0
    say "uv could not install $*; trying pip"
  fi
  "$python" -m pip --version || "$python" -m ensurepip || return 1
  "$python" -m pip install --disable-pip-version-check --no-input "$@" </dev/null
}

# Leaves a Python with every package of the named requirements file in $python.
ensure_environment() {
  local log="$venv/install.log" stamp="$venv/.installed-from-" began=$SECONDS pid
  if [ "$(uname -sm)" = "Darwin x86_64" ]; then
    fail "mvjax needs a Mac with Apple silicon and an arm64 shell: JAX has no Intel builds."
  fi
  if [ -f "$half_done" ]; then
    pid="$(cat "$half_done")"
    if kill -0 "$pid" 2>/dev/null; then
      fail "process $pid is installing into $venv. Wait for it, then run this again."
    fi
    say "an earlier installation into $venv did not finish: starting afresh"
    rm -rf "$venv"
  fi
  is_usable || make_environment
  if [ -f "$stamp$1" ] && [ "$(stamp_text "$1")" = "$(cat "$stamp$1")" ]; then return 0; fi
  if [ -f "$made_here" ]; then printf '%s\n' $$ >"$half_done"; fi
  say "installing $1 (the environment takes about 1.3 GB); the log is $log"
  if ! install_packages -r "$root/$1" >"$log" 2>&1; then
    rm -f "$half_done"  # nothing is changed until everything is downloaded
    tail -n 5 "$log" >&2
    fail "the installation failed after $((SECONDS - began)) s. The full log is $log"
  fi
  stamp_text "$1" >"$stamp$1"
  if [ "$1" = requirements-dev.txt ]; then  # includes the packages of the other
    stamp_text requirements.txt >"${stamp}requirements.txt"
  fi
  rm -f "$half_done"
  say "installed in $((SECONDS - began)) s"
}

find_gl() { "$python" -m launch.preflight --find-gl; }  # prints the first backend that renders

# Exports a MUJOCO_GL that really renders, after installing the libraries where that is possible.
# macOS needs nothing; a MUJOCO_GL that is already set is left to launch/preflight.py to test.
ensure_gl() {
  local known="$venv/.mujoco-gl" backend
  if [ "$(uname -s)" != Linux ] || [ -n "${MUJOCO_GL:-}" ]; then return 0; fi
  if [ ! -s "$known" ]; then
    # shellcheck disable=SC2086  # one word per package
    if ! backend="$(find_gl)" && ! { apt_install $gl_packages && backend="$(find_gl)"; }; then
      say "MuJoCo cannot render here: off-screen OpenGL is missing." \
        "Run 'sudo apt-get install -y $gl_packages', then run this again."
      return 1
    fi
    say "rendering with MUJOCO_GL=$backend"
    printf '%s\n' "$backend" >"$known"
  fi
  MUJOCO_GL="$(cat "$known")"
  export MUJOCO_GL
}
