#!/usr/bin/env bash
# Trains a small DreamLLM on real handwriting and shows what the model writes:
# launch/quickstart.sh [WORKDIR] [recipe overrides]
#
# Creates .venv in the repository if needed, trains examples/handwriting/config.py through all its stages, and leaves
# WORKDIR/report.html, WORKDIR/metrics.json and WORKDIR/checkpoint/. WORKDIR is ./quickstart unless given.
# Running it again continues where it stopped. Overrides such as --config.seed=1 are passed to the training.
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
[ "${1-unset}" != "" ] || shift # an empty WORKDIR means the default
for override; do
  case $override in
    --config.*=*) ;;
    *) fail "$override is not an override of the recipe; after WORKDIR give only overrides, such as --config.seed=1." ;;
  esac
done
if [ -e "$workdir" ] && [ ! -d "$workdir" ]; then
  fail "WORKDIR=$workdir is a file; give the path of a folder. It is created if it does not exist."
fi

# run MESSAGE MODULE [ARGUMENTS]: what asks for something wrong (exit code 2) has said so itself.
run() {
  local message=$1 module=$2 status=0
  shift 2
  "$python" -m "$module" "$@" || status=$?
  case $status in
    0) ;;
    2)
      rmdir "$workdir" 2>/dev/null || true # if nothing was written
      exit 1
      ;;
    *) fail "$message" ;;
  esac
}

prepare_python examples
expect_accelerators
mkdir -p "$workdir" 2>/dev/null || fail "The folder $workdir cannot be created; give a WORKDIR in a writable place."
workdir=$(CDPATH='' cd -- "$workdir" && pwd -P)
[ -w "$workdir" ] || fail "The folder $workdir is not writable; give another WORKDIR."
cd "$root"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"

say "Training examples/handwriting/config.py; everything is written to $workdir."
run "The training stopped early. Finished stages are in $workdir/stages, each with its model; run the same \
command again to continue." \
  dreamllm_jax.train --config=examples/handwriting/config.py --workdir="$workdir" "$@"
say "Evaluating the trained model."
run "The evaluation stopped early. The trained model is in $workdir; run the same command again to retry." \
  examples.handwriting.evaluate --workdir="$workdir"
say "Done: open $workdir/report.html to see what the model wrote."
