# Set-up shared by quickstart.sh, test.sh, libero.sh and .ci/run: sourced by them, never run by itself.
# It leaves its caller in the repository's folder.
#
#   ensure_environment requirements.txt    makes or repairs .venv and leaves its Python in $python
#   ensure_gl                              finds (or installs) off-screen OpenGL, exports MUJOCO_GL
#
# What a person may set:
#   PYTHON=/path/to/python3.12    the interpreter, instead of the newest one that runs
#   MVJAX_VENV=/path/to/folder    the environment's folder, instead of .venv in the repository
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
oldest_minor=11
newest_minor=13  # MuJoCo 3.3.0, which Meta-World pins, has no builds for Python 3.14
gl_packages="libegl1 libgl1 libgl1-mesa-dri"  # newer systems have no libosmesa6 any more

# Packages of other Pythons (a sourced ROS workspace sets this) must not leak into ours.
unset PYTHONPATH PYTHONHOME

say() { printf 'mvjax: %s\n' "$*" >&2; }

fail() {
  say "$@"
  exit 2
}

have_uv() { uv --version >/dev/null 2>&1; }

# Installs Debian packages if that takes no password.
apt_install() {
  local as_root="" log
  command -v apt-get >/dev/null 2>&1 || return 1
  if [ "$(id -u)" != 0 ]; then
    sudo -n true >/dev/null 2>&1 || return 1
    as_root="sudo -n"
  fi
  log="$(mktemp)"
  say "installing $* with apt-get"
  # A failed update (one mirror cannot be reached) need not hinder the installation.
  $as_root apt-get update -q >"$log" 2>&1 </dev/null || true
  if $as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -q --no-install-recommends "$@" >>"$log" 2>&1 </dev/null; then
    rm -f "$log"
  else
    say "apt-get failed; its log is $log"
    return 1
  fi
}

# Prints "MINOR READY VERSION PATH" of a Python 3 that really runs: a version manager's shim may
# exist and fail. READY is 1 where it can bring pip into an environment (Debian splits that off).
probe_python() {
  "$1" -c '
import sys
try:
    import ensurepip, venv
    ready = 1
except ImportError:
    ready = 0
v = sys.version_info
cpython = v[0] == 3 and sys.implementation.name == "cpython"
print("%d %d %d.%d.%d %s" % (v[1] if cpython else 0, ready, v[0], v[1], v[2], sys.executable))
' 2>/dev/null </dev/null
}

python_candidates() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    printf '%s\n' "$PYTHON"
    return
  fi
  printf '%s\n' python3.13 python3.12 python3.11 python3
  for candidate in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/3.*/bin/python; do
    if [ -x "$candidate" ]; then printf '%s\n' "$candidate"; fi
  done
}

# Prints the path of the newest supported interpreter that runs; says what is wrong if none does.
choose_python() {
  local best=0 best_path="" bare=0 bare_path="" found="" candidate answer minor ready version path
  while IFS= read -r candidate; do
    answer="$(probe_python "$candidate")" || continue
    read -r minor ready version path <<<"$answer"
    case "$found" in *"($path)"*) continue ;; esac
    found="${found:+$found, }$version ($path)"
    if [ "$minor" -lt $oldest_minor ] || [ "$minor" -gt $newest_minor ]; then continue; fi
    if [ "$ready" = 1 ] || have_uv; then
      if [ "$minor" -gt "$best" ]; then best="$minor" best_path="$path"; fi
    elif [ "$minor" -gt "$bare" ]; then
      bare="$minor" bare_path="$path"
    fi
  done <<<"$(python_candidates)"
  if [ "$best" = 0 ] && [ "$bare" != 0 ]; then
    apt_install "python3.$bare-venv" ||
      fail "$bare_path cannot make environments (its venv module is missing)." \
        "Run 'sudo apt-get install -y python3.$bare-venv', then run this again."
    best="$bare" best_path="$bare_path"
  fi
  if [ "$best" = 0 ] && [ -n "${PYTHON:-}" ] && [ -z "$found" ]; then
    fail "PYTHON=$PYTHON does not run. Set PYTHON to a Python 3.11, 3.12 or 3.13, or unset it."
  elif [ "$best" = 0 ]; then
    fail "mvjax needs Python 3.11 or newer (up to 3.$newest_minor); found: ${found:-none that runs}." \
      "Install Python 3.12, or set PYTHON=/path/to/python3.12."
  fi
  printf '%s\n' "$best_path"
}

# Prints "3.12 /where/it/lives": the same for an interpreter and for the environments made from it.
describe_python() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2], sys.base_prefix)' 2>/dev/null </dev/null
}

# What an environment was made from: its Python, the requirements file and, where that names this
# project, the project's place and what pyproject.toml says about its packages.
stamp_text() {
  describe_python "$python" && cat "$root/$1" || return 1
  case "$(cat "$root/$1")" in
    *"-e ."*)
      "$python" -c '
import pathlib, sys, tomllib
folder = pathlib.Path(sys.argv[1])
settings = tomllib.loads((folder / "pyproject.toml").read_text())
print(folder, settings["project"], settings["build-system"], settings["tool"].get("setuptools"))
' "$root" </dev/null ;;
  esac
}

stamp_file() { printf '%s\n' "$venv/.installed-from-$1"; }

is_installed() {
  local wanted
  [ -f "$(stamp_file "$1")" ] || return 1
  wanted="$(stamp_text "$1")" || return 1
  [ "$wanted" = "$(cat "$(stamp_file "$1")")" ]
}

# True for an environment that can be kept and added to: its Python runs, is supported, and is the
# one that PYTHON names, if that is set.
is_usable() {
  local answer
  answer="$(probe_python "$python")" || return 1
  if [ "${answer%% *}" -lt $oldest_minor ] || [ "${answer%% *}" -gt $newest_minor ]; then return 1; fi
  [ -z "${PYTHON:-}" ] || [ "$(describe_python "$PYTHON")" = "$(describe_python "$python")" ]
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
  printf '%s\n' $$ >"$half_done"
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

# Stops where another process is installing; forgets an installation that was interrupted.
check_half_done() {
  local pid
  [ -f "$half_done" ] || return 0
  pid="$(cat "$half_done")"
  if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
    fail "process $pid is installing into $venv. Wait for it, then run this again."
  fi
  say "an earlier installation into $venv did not finish: starting afresh"
  rm -rf "$venv"
}

# Leaves a Python with every package of the named requirements file in $python.
ensure_environment() {
  local requirements="$1" log="$venv/install.log" began=$SECONDS fresh=0
  if [ "$(uname -sm)" = "Darwin x86_64" ]; then
    fail "mvjax needs a Mac with Apple silicon and an arm64 shell: JAX has no Intel builds."
  fi
  check_half_done
  if is_usable; then
    if is_installed "$requirements"; then return 0; fi
    if [ -f "$made_here" ]; then printf '%s\n' $$ >"$half_done"; fi
    : >"$log"
  else
    make_environment
    fresh=1
  fi
  say "installing $requirements (the environment takes about 1.3 GB); the log is $log"
  if ! install_packages -r "$root/$requirements" >>"$log" 2>&1; then
    # What was there before still works: nothing is changed until everything is downloaded.
    if [ "$fresh" = 0 ]; then rm -f "$half_done"; fi
    tail -n 5 "$log" >&2
    fail "the installation failed after $((SECONDS - began)) s. The full log is $log"
  fi
  stamp_text "$requirements" >"$(stamp_file "$requirements")"
  if [ "$requirements" = requirements-dev.txt ]; then  # includes the packages of the other
    stamp_text requirements.txt >"$(stamp_file requirements.txt)"
  fi
  rm -f "$half_done"
  say "installed in $((SECONDS - began)) s"
}

# Prints the first backend that really renders.
find_gl() { "$python" -m launch.preflight --find-gl; }

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
