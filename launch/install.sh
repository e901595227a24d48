#!/usr/bin/env bash
# Installs the package and its pinned dependencies into the repository's .venv:
# launch/install.sh runtime|tpu|cuda [--dry-run]
#
# `tpu` adds libtpu, `cuda` adds CUDA 12's libraries. Running it again does nothing unless a version has changed.
# If the Python of a TPU VM is too old, `apt-get install python3.11-venv` adds one that this script finds.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"

case ${1:-} in
  runtime | tpu | cuda) ;;
  -h | --help)
    say "Usage: launch/install.sh runtime|tpu|cuda [--dry-run]"
    exit 0
    ;;
  *) fail "'${1:-}' cannot be installed; give runtime, tpu or cuda." ;;
esac
case ${2:-} in
  '') prepare_python "$1" ;;
  --dry-run)
    extras=
    [ "$1" = runtime ] || extras="[$1]"
    find_python
    version=$(python_version "$base_python")
    say "$base_python -m venv $venv # unless it exists with Python ${version%??}.${version#?}"
    say "$venv/bin/python -m pip install --constraint launch/constraints/py$version.txt --editable '.$extras'"
    ;;
  *) fail "'$2' is unknown; give --dry-run or nothing after $1." ;;
esac
