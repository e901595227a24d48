#!/usr/bin/env bash
# Runs the tests: launch/test.sh [pytest arguments]
#
# Creates .venv in the repository if needed. Paths among the arguments are relative to the repository. Without
# arguments, two processes share the test files; each needs about one core, mostly for compiling. With arguments
# there is one process.
# Examples: launch/test.sh tests/models -k llama -x       launch/test.sh -m slow (before a release)
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"

prepare_python test
cd "$root"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$root/.cache/jax}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
say "Running the tests with JAX on ${JAX_PLATFORMS} (compiled programs are cached in $JAX_COMPILATION_CACHE_DIR)."
if [ $# -eq 0 ]; then
  set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
if [ "${CI:-}" = true ]; then
  set -- --color=no --durations=10 "$@"
fi
exec "$python" -m pytest "$@"
