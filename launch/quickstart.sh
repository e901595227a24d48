#!/usr/bin/env bash
# Trains a small DreamLLM on real handwriting and shows what it writes:
# launch/quickstart.sh [WORKDIR] [recipe overrides]
#
# Makes .venv in the repository if needed, trains configs/handwriting.py through all its stages, and leaves
# WORKDIR/report.html, WORKDIR/metrics.json and WORKDIR/checkpoint/. WORKDIR is ./quickstart unless given.
# Run again, it goes on where it stopped. An override is handed to the training, as --config.seed=1.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"

case ${1:-} in
  -h | --help)
    say "Usage: launch/quickstart.sh [WORKDIR] [recipe overrides such as --config.seed=1]"
    exit 0
    ;;
  -* | '') workdir=quickstart ;;
  *)
    workdir=$1
    shift
    ;;
esac
[ "${1-unset}" != "" ] || shift # an empty WORKDIR is the usual one
for override; do
  case $override in
    --config.*=*) ;;
    *) fail "$override is no override of the recipe; after WORKDIR give such as --config.seed=1 only." ;;
  esac
done
if [ -e "$workdir" ] && [ ! -d "$workdir" ]; then
  fail "WORKDIR=$workdir is a file; give the path of a folder, which is made where it does not exist."
fi

# run MESSAGE MODULE [ARGUMENTS]: what asks for something wrong (exit code 2) has said so itself.
run() {
  local message=$1 module=$2 status=0
  shift 2
  "$python" -m "dreamllm_jax.$module" "$@" || status=$?
  case $status in
    0) ;;
    2)
      rmdir "$workdir" 2>/dev/null || true # where nothing was begun
      exit 1
      ;;
    *) fail "$message" ;;
  esac
}

prepare_python runtime
mkdir -p "$workdir" 2>/dev/null || fail "The folder $workdir cannot be made; give a WORKDIR that can be written to."
workdir=$(CDPATH='' cd -- "$workdir" && pwd -P)
[ -w "$workdir" ] || fail "The folder $workdir cannot be written to; give another WORKDIR."
cd "$root"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"

say "Training configs/handwriting.py; everything is written to $workdir."
run "The training stopped early; what it had finished is in $workdir/stages (each stage's model is a folder \
there), and the same command goes on from there." \
  train --config=configs/handwriting.py --workdir="$workdir" "$@"
say "Evaluating what was trained."
run "The evaluation stopped early; the trained model is in $workdir, and the same command tries again." \
  evaluate --workdir="$workdir"
say "Done: open $workdir/report.html to see what the model wrote."
