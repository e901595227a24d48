#!/usr/bin/env bash
# Installs the package with its pinned versions into .venv of the repository: launch/install.sh runtime|tpu|cuda
#
# `tpu` adds libtpu, `cuda` adds CUDA 12's libraries. Run again, it does nothing unless a version has changed.
# TPU VMs may bring a Python that is too old; `apt-get install python3.11-venv` adds one, and this script finds it.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"

case ${1:-} in
  runtime | tpu | cuda) prepare_python "$1" ;;
  -h | --help) say "Usage: launch/install.sh runtime|tpu|cuda" ;;
  *) fail "'${1:-}' is nothing that can be installed; give runtime, tpu or cuda." ;;
esac
