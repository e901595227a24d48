# shellcheck shell=bash
# Finds a suitable Python and keeps the repository's .venv up to date.
#
# Sourced by quickstart.sh, test.sh, install.sh and .ci/run. After `prepare_python runtime` (or examples, test, tpu, cuda),
# $python is the interpreter of an up-to-date .venv. $PYTHON, if set, names the Python to use; otherwise
# `python3` is preferred, the machine's own choice. Until a Python is found, only builtins of the shell are used.

suitable="Python 3.11, 3.12 or 3.13"
torch="torch==2.13.0" # as in launch/constraints/py311.txt
root=$(CDPATH='' cd -- "${BASH_SOURCE[0]%/*}/.." && pwd -P)
venv=$root/.venv

say() { printf '%s\n' "$*"; }

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# python_version COMMAND: prints "311" or the like if the command is a suitable Python; otherwise prints the reason
# and returns false.
python_version() {
  local found
  found=$("$1" -c 'import sys; print("%d%02d" % sys.version_info[:2])' 2>/dev/null) || {
    printf 'it does not run'
    return 1
  }
  case $found in
    311 | 312 | 313) ;;
    *)
      printf 'it is Python %s.%s' "${found%??}" "$((10#${found#?}))"
      return 1
      ;;
  esac
  "$1" -c 'import ensurepip, venv' 2>/dev/null || {
    printf 'its venv module is missing (on Debian and Ubuntu: apt-get install python3-venv)'
    return 1
  }
  printf '%s' "$found"
}

# Sets base_python to a suitable Python, or fails and says what was tried.
find_python() {
  local candidate answer tried=
  if [ -n "${PYTHON:-}" ]; then
    answer=$(python_version "$PYTHON") ||
      fail "PYTHON=$PYTHON cannot be used: $answer; give the path of a $suitable."
    base_python=$PYTHON
    return
  fi
  for candidate in python3 python3.12 python3.13 python3.11 python; do
    command -v "$candidate" >/dev/null || continue
    if answer=$(python_version "$candidate"); then
      base_python=$candidate
      return
    fi
    tried="$tried${tried:+; }$candidate was tried, but $answer"
  done
  fail "No suitable Python was found: $suitable is needed (${tried:-no Python is on the PATH});" \
    "install one, or name one with PYTHON=/path/to/python."
}

# Prints one line about all that an installation depends on; when it changes, the packages are installed again.
fingerprint() {
  "$python" - "$root" "$1" 2>/dev/null <<'EOF'
import hashlib, pathlib, sys

root, version = pathlib.Path(sys.argv[1]), sys.argv[2]
files = ["setup.py", "pyproject.toml", "launch/python.sh", f"launch/constraints/py{version}.txt"]
content = b"\0".join((root / name).read_bytes() for name in files)
print(hashlib.sha256(content).hexdigest(), sys.version.split()[0], root)
EOF
}

# pip_install WHAT... : shows one line of progress; pip's full output is in .venv/install.log.
pip_install() {
  local line status
  (cd "$root" && "$python" -m pip install --progress-bar off --disable-pip-version-check "$@" 2>&1) |
    while IFS= read -r line; do
      printf '%s\n' "$line" >>"$venv/install.log"
      case $line in
        Collecting* | "Installing collected"* | Building*)
          line=${line%% (from*}
          if [ -t 1 ]; then
            printf '\r\033[K  %s' "${line:0:70}"
          elif [ "${CI:-}" = true ]; then
            printf '  %s\n' "${line:0:100}"
          fi
          ;;
      esac
    done
  status=${PIPESTATUS[0]}
  if [ -t 1 ]; then printf '\r\033[K'; fi
  return "$status"
}

install_failed() {
  local log=$venv/install.log reason="pip could not install the packages"
  if grep -qE 'NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|NameResolutionError' "$log"; then
    reason="The packages could not be downloaded (is there a network connection?)"
  fi
  if [ "${CI:-}" = true ]; then
    say "The last lines of pip's log:"
    tail -n 20 "$log" || true
  fi
  fail "$reason; pip's output is in $log. Run this script again to continue."
}

# Returns whether to install PyTorch for the parity tests: yes for a CPU build, no for gigabytes of CUDA.
# DREAMLLM_TORCH=1 installs whatever build there is, DREAMLLM_TORCH=0 none.
torch_wanted() {
  local plan
  [ "${DREAMLLM_TORCH:-}" != 1 ] || return 0
  [ "${DREAMLLM_TORCH:-}" != 0 ] && [ "$1" = 311 ] &&
    plan=$("$python" -m pip install --dry-run --disable-pip-version-check "$torch" 2>&1) &&
    case $plan in *"Collecting nvidia"* | *"Collecting cuda"*) false ;; esac
}

# Installs the packages for Python version $1 and purpose $2 into .venv.
install_packages() {
  local extras=
  say "Installing the packages into $venv (some minutes the first time)."
  rm -f "$venv"/installed-* "$venv/install.log"
  case $2 in examples | tpu | cuda) extras=$2 ;; esac
  if [ "$2" = test ]; then
    extras="test"
    if torch_wanted "$1"; then
      extras="test,torch"
    else
      say "Leaving out PyTorch (no CPU build for this Python was found): the parity tests will be skipped;" \
        "DREAMLLM_TORCH=1 installs it anyway."
    fi
  fi
  pip_install --constraint "launch/constraints/py$1.txt" --editable ".${extras:+[$extras]}" || install_failed
}

# expect_accelerators: without one on this machine, JAX uses the CPU. Otherwise the compilers of TPUs and GPUs, which
# .venv holds for the tests, would complain that they find none.
expect_accelerators() {
  local device
  [ -z "${JAX_PLATFORMS:-}" ] && [ "$(uname)" = Linux ] || return 0
  for device in /dev/nvidia* /dev/dxg /dev/kfd /dev/accel* /dev/vfio/[0-9]*; do
    [ ! -e "$device" ] || return 0
  done
  export JAX_PLATFORMS=cpu
}

# prepare_python runtime|examples|test|tpu|cuda : creates or updates .venv and sets python to its interpreter.
prepare_python() {
  local purpose=$1 version stamp wanted
  python=$venv/bin/python
  if [ -n "${PYTHON:-}" ] || ! version=$(python_version "$python"); then
    find_python
    version=$(python_version "$base_python")
    if [ "$(python_version "$python")" != "$version" ]; then
      say "Creating $venv with $(command -v "$base_python") (Python ${version%??}.${version#?})."
      "$base_python" -m venv --clear "$venv" >/dev/null 2>&1 ||
        fail "$base_python could not create the virtual environment $venv: is the folder writable, with free space?"
    fi
  fi
  stamp=$(fingerprint "$version") ||
    fail "Files that describe the installation are missing from $root; clone the repository again."
  wanted=$stamp
  if [ "$purpose" = test ]; then wanted="$stamp torch=${DREAMLLM_TORCH:-auto}"; fi
  if [ "$(cat "$venv/installed-$purpose" 2>/dev/null)" = "$wanted" ]; then
    say "Using $venv (up to date)."
    return
  fi
  install_packages "$version" "$purpose"
  printf '%s\n' "$wanted" >"$venv/installed-$purpose"
  printf '%s\n' "$stamp" >"$venv/installed-runtime"
  if [ "$purpose" = test ]; then printf '%s\n' "$stamp" >"$venv/installed-examples"; fi # the tests need them too
}
