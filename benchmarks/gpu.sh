#!/usr/bin/env bash
# Measures this package beside PyTorch on one H100 or H200 within ten minutes:
# benchmarks/gpu.sh --out=DIR [--wheels=DIR] [--python=python3] [--seconds=590] [--device=gpu] [--size=full] [MORE ...]
#
# Installs the packages that are missing: from the folder of wheels if one is given, without a network, else by pip. Then runs
# `python -m benchmarks.beside_torch --budget=...` for the rest of the seconds: train steps, decoding and reading prompts, text to
# image and attention, ours and PyTorch's, the most important first. Leaves results.json, table.md, chart.png and the
# processes' logs in --out. MORE goes to the benchmark: cases, --eager-only or --together=1.
#
# Compiled programs stay in .cache/, so that a second call has more time to measure. Needs Python 3.11 or newer with JAX for
# CUDA and torch; --device=cpu --size=tiny tries the script without a GPU.
set -euo pipefail
began=$SECONDS
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
root=$(CDPATH='' cd -- "$here/.." && pwd -P)

say() { printf '%s\n' "$*"; }

fail() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# folder NAME PATH: prints the absolute path of a folder that exists.
folder() {
  (CDPATH='' cd -- "$2" 2>/dev/null && pwd -P) || fail "--$1=$2 is not a folder; give one that exists."
}

# missing: prints the names of the packages, one a line, that the benchmark imports and this Python lacks.
missing() {
  "$python" - <<'EOF'
import importlib.util

# module: what pip calls it. JAX and torch come with the machine: another build would not know its GPU.
modules = {
    "absl": "absl-py", "array_record": "array_record", "diffusers": "diffusers", "flax": "flax", "grain": "grain",
    "huggingface_hub": "huggingface_hub", "importlib_metadata": "importlib_metadata", "jaxtyping": "jaxtyping",
    "jinja2": "jinja2", "lazy_importer": "lazy-importer", "matplotlib": "matplotlib",
    "ml_collections": "ml_collections", "optax": "optax", "packaging": "packaging", "orbax.checkpoint": "orbax-checkpoint", "PIL": "pillow",
    "portpicker": "portpicker", "google.protobuf": "protobuf", "safetensors": "safetensors",
    "sentencepiece": "sentencepiece", "shtab": "shtab", "tensorboardX": "tensorboardX", "tokenizers": "tokenizers",
    "tqdm": "tqdm", "transformers": "transformers",
}


def found(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package
        return False


print("\n".join(package for module, package in modules.items() if not found(module)))
EOF
}

out='' wheels='' python=python3 seconds=590 device=gpu size=full more=()
for argument; do
  case $argument in
    --out=*) out=${argument#*=} ;;
    --wheels=*) wheels=${argument#*=} ;;
    --python=*) python=${argument#*=} ;;
    --seconds=*) seconds=${argument#*=} ;;
    --device=*) device=${argument#*=} ;;
    --size=*) size=${argument#*=} ;;
    -h | --help)
      sed -n '2,12s/^# \{0,1\}//p' "$here/gpu.sh"
      exit 0
      ;;
    --budget=*) fail "$argument is set by this script; give --seconds=N for all of it, installation included." ;;
    *) more+=("$argument") ;;
  esac
done
[ -n "$out" ] || fail "--out is missing; give the folder for the results, as --out=DIR."
case $seconds in '' | *[!0-9]*) fail "--seconds=$seconds is not a whole number; give one from 60 on." ;; esac
[ "$seconds" -ge 60 ] || fail "--seconds=$seconds is too short; give at least 60."
command -v "$python" >/dev/null || fail "--python=$python was not found; give the path of a Python 3.11 or newer."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "--python=$python is too old; give Python 3.11 or newer."
[ -z "$wheels" ] || wheels=$(folder wheels "$wheels")
mkdir -p -- "$out" 2>/dev/null || fail "--out=$out cannot be created; give a folder in a writable place."
out=$(folder out "$out")
cd "$root"

for module in jax torch; do
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$module') is None)" ||
    fail "$python has no $module; install one that knows this machine's GPU."
done
packages=$root/.cache/gpu-packages
export PYTHONPATH="$root:$packages${PYTHONPATH:+:$PYTHONPATH}"
names=$(missing)
if [ -n "$names" ]; then
  say "Installing $(printf '%s' "$names" | tr '\n' ' ')"
  options=(--quiet --disable-pip-version-check)
  # A folder of wheels need not have what they depend on, which the machine has; nothing of the machine's is replaced.
  [ -z "$wheels" ] || options+=(--no-index --find-links "$wheels" --no-deps --target "$packages")
  # shellcheck disable=SC2086 # one word for each package
  "$python" -m pip install "${options[@]}" $names >"$out/install.log" 2>&1 ||
    fail "pip could not install the packages; $out/install.log says why (--wheels=DIR takes a folder that has all of them)."
fi
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}"
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$root/.cache/inductor}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$root/.cache/triton}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 HF_HUB_OFFLINE=1

left=$((seconds - (SECONDS - began) - 5)) # the processes end in less than 5 s
[ "$left" -ge 20 ] || fail "The installation has left $left of $seconds seconds; call the script again, it is done now."
say "Measuring for $left seconds; everything is written to $out."
exec "$python" -m benchmarks.beside_torch --budget="$left" --out="$out" --device="$device" --size="$size" ${more[@]+"${more[@]}"}
