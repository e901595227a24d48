#!/usr/bin/env bash
# Runs a command on this host that outlives the connection, keeps its log, and reports how it ended:
# launch/job.sh start NAME [--env FILE] [--dry-run] -- COMMAND...
# launch/job.sh logs|status|stop NAME
#
#   start   starts the command in the background; refused while a job of that name runs. After the job has ended,
#           start runs it again and appends to the log: training resumes from its workdir
#   logs    prints the log as it grows, until the job ends; the exit code is the job's
#   status  prints one line: running, ended with an exit code, or lost (the host was restarted)
#   stop    sends SIGTERM to the job and its children, and SIGKILL after 5 minutes
#
# Jobs are kept in ~/.dreamllm_jax/NAME (log, pid, exit code). tpu_vm_run.sh calls this on every host.
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/cluster.sh
. "$here/cluster.sh"

action=${1:-}
case $action in
  start | logs | status | stop) shift ;;
  -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "'$action' is not an action; give start, logs, status or stop (see ${0##*/} --help)." ;;
esac
name=${1:-}
case $name in
  '' | -* | *[!A-Za-z0-9_.-]* | .*) fail "'$name' is not a valid name of a job; use letters, digits, - and _." ;;
esac
shift
folder=$HOME/.dreamllm_jax/$name

# state: prints running, ended, lost or none. A process from before a reboot is not this job's.
state() {
  local pid
  if [ -f "$folder/exit" ]; then
    say ended
  elif [ ! -f "$folder/pid" ]; then
    say none
  elif pid=$(cat "$folder/pid") && kill -0 "$pid" 2>/dev/null && [ "$(boot)" = "$(cat "$folder/boot")" ]; then
    say running
  else
    say lost
  fi
}

boot() { cat /proc/sys/kernel/random/boot_id 2>/dev/null || say unknown; }

start() {
  while :; do
    case ${1:-} in
      --env)
        with_value "$@"
        load_env "$2"
        shift 2
        ;;
      --dry-run)
        dry=1
        shift
        ;;
      *) break ;;
    esac
  done
  [ "${1:-}" = -- ] || fail "-- is missing before the command (see ${0##*/} --help)."
  shift
  [ $# -gt 0 ] || fail "The command is missing after -- (see ${0##*/} --help)."
  [ "$(state)" != running ] ||
    fail "The job $name is already running on $(hostname); stop it first, or follow its logs."
  check_workdir "$@"
  if [ "$dry" = 1 ]; then
    say "cd $(quoted "$root") && $(remote_command "$@") >>$(quoted "$folder/log") 2>&1 &"
    return
  fi
  mkdir -p "$folder"
  rm -f "$folder/exit" "$folder/pid"
  boot >"$folder/boot"
  printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$(remote_command "$@")" >>"$folder/log"
  # Its own session outlives the connection, and its number stands for the job and all its children.
  # shellcheck disable=SC2016
  PYTHONUNBUFFERED=1 setsid bash -c '
    folder=$1 root=$2; shift 2
    cd "$root"; status=0
    trap : TERM # the command may save its state first; this shell stays to record the exit code
    echo $$ >"$folder/pid.new"; mv "$folder/pid.new" "$folder/pid"
    "$@" || status=$?
    echo "$status" >"$folder/exit.new"; mv "$folder/exit.new" "$folder/exit"
  ' job "$folder" "$root" env "${env_settings[@]}" "$@" >>"$folder/log" 2>&1 </dev/null &
  while [ ! -f "$folder/pid" ]; do sleep 0.05; done
  say "$(hostname): started $name; its log is $folder/log."
}

logs() {
  local tail_pid
  [ -f "$folder/log" ] || fail "Job $name does not exist on $(hostname); start it first."
  tail -n +1 -F "$folder/log" 2>/dev/null &
  tail_pid=$!
  trap 'kill "$tail_pid" 2>/dev/null || true' EXIT
  while [ "$(state)" = running ]; do sleep 1; done
  sleep 1.1 # for the last lines
  [ "$(state)" = ended ] || fail "The job $name on $(hostname) is lost: the host was restarted; start it again."
  exit "$(cat "$folder/exit")"
}

stop() {
  local pid _
  [ "$(state)" = running ] || { status; return; }
  pid=$(cat "$folder/pid")
  kill -TERM -- "-$pid"
  for _ in {1..3000}; do
    kill -0 -- "-$pid" 2>/dev/null || break
    sleep 0.1
  done
  if kill -KILL -- "-$pid" 2>/dev/null; then
    say "$(hostname): $name did not end within 5 minutes and was killed." >&2
  fi
  [ -f "$folder/exit" ] || say 143 >"$folder/exit"
  status
}

status() {
  case $(state) in
    running) say "$(hostname): $name is running (process $(cat "$folder/pid"))." ;;
    ended) say "$(hostname): $name ended with exit code $(cat "$folder/exit")." ;;
    lost) say "$(hostname): $name is lost: the host was restarted." ;;
    none) say "$(hostname): job $name does not exist." ;;
  esac
}

"$action" "$@"
