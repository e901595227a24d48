#!/usr/bin/env bash
# Runs a command as several processes on this machine's CPU, as a cluster would run it on several hosts:
# launch/local_processes.sh N [--devices D] -- COMMAND...
#
# N processes find each other on localhost, each with D emulated devices (default 1). Every line of their output
# begins with the number of the process. If one fails, the others are ended and its exit code is this script's.
# Ctrl-C ends all; a TERM is passed on, and a training run then has 5 minutes to save its state. This is for trials
# and tests: one process makes as good a use of a machine's cores. Programs are recompiled at every start.
# Example: launch/local_processes.sh 2 --devices 4 -- python -m dreamllm_jax.train --config=R.py --workdir=RUN
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"

usage="usage: launch/local_processes.sh N [--devices D] -- COMMAND..."
case ${1:-} in
  -h | --help)
    say "$usage"
    exit 0
    ;;
  '' | *[!0-9]* | 0*) fail "N, the number of processes, is '${1:-}'; give 1 or more ($usage)." ;;
esac
processes=$1
devices=1
shift
case ${1:-} in
  --devices)
    devices=${2:-}
    shift $(($# > 1 ? 2 : 1))
    ;;
  --devices=*)
    devices=${1#*=}
    shift
    ;;
esac
case $devices in '' | *[!0-9]* | 0*) fail "--devices is '$devices'; give 1 or more ($usage)." ;; esac
[ "${1:-}" = -- ] || fail "-- is missing before the command ($usage)."
shift
[ $# -gt 0 ] || fail "The command is missing after -- ($usage)."

# Sets port to a free port of localhost.
find_port() {
  local tries
  for tries in {1..50}; do
    port=$((20000 + (RANDOM + tries) % 12000))
    (exec 4<>"/dev/tcp/localhost/$port") 2>/dev/null || return 0
  done
  fail "No free port was found on localhost in 50 tries; check what is running there, and try again."
}

# prefixed I: passes lines on, each after the number of its process; it outlives the process that writes them.
prefixed() {
  local line
  trap '' INT TERM
  while IFS= read -r line || [ -n "$line" ]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

# start I COMMAND...: starts process I in the background, in its own process group; it reports its exit code.
start() {
  local index=$1
  shift
  {
    status=0
    JAX_PROCESS_ID=$index "$@" 3>&- </dev/null 2>&1 || status=$?
    printf '%s %s\n' "$index" "$status" >&3
  } | prefixed "$index" 3>&- &
  leaders+=("$(jobs -p %%)")
  disown # or bash would report how each ended
}

# signal NAME: signals all processes and their children; returns false if all have ended.
signal() {
  local leader status=1
  for leader in "${leaders[@]}"; do
    if kill -s "$1" -- "-$leader" 2>/dev/null; then status=0; fi
  done
  return "$status"
}

# stop SECONDS: sends TERM to all processes, and KILL after so many seconds. A training run saves its state on TERM.
stop() {
  local tenths=$((10 * $1)) i
  signal TERM || return 0
  for ((i = 0; i < tenths; i++)); do
    signal 0 || return 0
    sleep 0.1
  done
  signal KILL || true
}

find_port
folder=$(mktemp -d "${TMPDIR:-/tmp}/local_processes.XXXXXX")
trap 'rm -rf "$folder"' EXIT
trap 'signal INT || true; stop 3; exit 130' INT
trap 'stop 300; exit 143' TERM HUP
mkfifo "$folder/ends"
exec 3<>"$folder/ends"

export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes
export NPROC="${NPROC:-64}" # XLA's threads: with too few, all may wait for a device that no thread is left to run
export PYTHONUNBUFFERED=1
flags=
for flag in ${XLA_FLAGS:-}; do
  case $flag in --xla_force_host_platform_device_count=*) ;; *) flags="$flags $flag" ;; esac
done
export XLA_FLAGS="${flags# }${flags:+ }--xla_force_host_platform_device_count=$devices"

leaders=()
set -m # each process gets its own group, so that it can be ended with all its children
for ((i = 0; i < processes; i++)); do
  start "$i" "$@"
done
for ((ended = 0; ended < processes; ended++)); do
  read -r who status <&3
  if [ "$status" != 0 ]; then
    stop 3 # without it they would wait forever
    say "${0##*/}: process $who of $processes ended with exit code $status; the others were ended." >&2
    exit "$status"
  fi
done
while signal 0; do sleep 0.05; done # let the last lines through
