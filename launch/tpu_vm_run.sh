#!/usr/bin/env bash
# Copies the repository to every host of TPU slices, and runs a command on all of them at once:
# launch/tpu_vm_run.sh run SLICE --zone ZONE [options] -- COMMAND...
# launch/tpu_vm_run.sh preflight SLICE --zone ZONE [options] [-- OPTIONS OF preflight.sh]
# launch/tpu_vm_run.sh setup|logs|status|stop SLICE --zone ZONE [options]
#
#   setup      copies the repository (what git would add) to ~/dreamllm_jax and installs it with pinned versions
#   preflight  after setup: runs launch/preflight.sh --platform tpu on every host at once
#   start      starts the command on every host; it outlives the connection (launch/job.sh)
#   logs       follows the log of one host until the job ends; the exit code is the job's
#   run        setup, start, logs. After a preemption recreate the slice and run the same command; training resumes
#              from its workdir, a folder that all hosts share (a mounted bucket or file system)
#   status     prints one line from every host
#   stop       ends the job on every host; you pay for the slice until it is deleted (tpu_queued_resource.sh)
#
#   --project P   the project (default: gcloud's)
#   --slices N    the slices SLICE-0 to SLICE-(N-1) of one request (default: one slice, named SLICE)
#   --name J      the job's name (default: train)
#   --env FILE    settings for the command, such as launch/env/tpu_v5p.env; they are printed first
#   --worker W    logs: the host of the first slice whose log is followed (default 0)
#   --dry-run     print the commands and run nothing
#
# The words of COMMAND are passed on unchanged, except that `python` as the first word is the repository's.
# Example: launch/tpu_vm_run.sh run dream --zone us-east5-a --env launch/env/tpu_v5p.env -- \
#            python -m dreamllm_jax.train --config=configs/stage2.py --workdir=/mnt/runs/stage2
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/cluster.sh
. "$here/cluster.sh"

action=${1:-}
case $action in
  setup | preflight | start | logs | run | status | stop) shift ;;
  -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "'$action' is not an action; give run, setup, preflight, start, logs, status or stop (see --help)." ;;
esac
slice='' zone='' project='' slices=1 name=train env='' worker=0 command=()
while [ $# -gt 0 ]; do
  case $1 in
    --zone | --project | --slices | --name | --env | --worker)
      with_value "$@"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) dry=1 ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    --)
      shift
      command=("$@")
      break
      ;;
    -*) fail "$1 is unknown; see ${0##*/} --help (the hosts' command comes after --)." ;;
    *)
      [ -z "$slice" ] || fail "'$1' comes after the slice $slice; the hosts' command comes after --."
      slice=$1
      ;;
  esac
  shift
done
given "the name of the SLICE" "$slice"
given --zone "$zone"
case $slices in '' | *[!0-9]* | 0*) fail "--slices is '$slices'; give a whole number, 1 or more." ;; esac
case $action in
  start | run)
    [ ${#command[@]} -gt 0 ] || fail "The command is missing; give it after -- (see ${0##*/} --help)."
    check_workdir "${command[@]}"
    ;;
  preflight) ;;
  *) [ ${#command[@]} = 0 ] || fail "$action does not take a command; run and start do." ;;
esac
[ -z "$env" ] || load_env "$env"
need gcloud "see cloud.google.com/sdk/docs/install"
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
if [ "$slices" = 1 ]; then names=("$slice"); else
  names=()
  for ((i = 0; i < slices; i++)); do names+=("$slice-$i"); done
fi

# on SLICE WORKER COMMAND: runs a line of shell on one host, or on all of them.
on() {
  run gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

everywhere() {
  local one
  for one in "${names[@]}"; do
    on "$one" all "$1" || fail "$one: it failed on some hosts; see their messages above, and run it again."
  done
}

# What setup does on a host. It deletes nothing, because a workdir may be in the folder.
# shellcheck disable=SC2016
unpack='set -e; mkdir -p ~/dreamllm_jax; tar -xzf ~/dreamllm_jax.tgz -C ~/dreamllm_jax;
find_python() { for python in python3.12 python3.11 python3.13; do
  if command -v $python >/dev/null; then return 0; fi; done; return 1; };
if ! find_python; then
  sudo apt-get -o DPkg::Lock::Timeout=300 -q update;
  sudo apt-get -o DPkg::Lock::Timeout=300 -q install -y python3.11-venv;
  find_python;
fi;
CI=true PYTHON=$python ~/dreamllm_jax/launch/install.sh tpu'

setup() {
  local folder archive one
  if [ "$dry" = 1 ]; then
    archive=dreamllm_jax.tgz
    say "git ls-files -co --exclude-standard | tar -czf $archive -T -"
  else
    folder=$(mktemp -d "${TMPDIR:-/tmp}/tpu_vm_run.XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf $(quoted "$folder")" EXIT
    archive=$folder/dreamllm_jax.tgz
    (
      cd "$root" && git ls-files -z -co --exclude-standard | while IFS= read -r -d '' file; do
        [ ! -f "$file" ] || printf '%s\0' "$file"
      done | tar --null -czf "$archive" -T -
    ) || fail "The repository could not be packed: is $root a git clone, and does ${TMPDIR:-/tmp} have space?"
  fi
  for one in "${names[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$one:dreamllm_jax.tgz" "${where[@]}" --worker=all ||
      fail "The repository could not be copied to every host of $one; see gcloud's message above."
  done
  everywhere "$unpack"
}

# job ACTION [WORD...]: prints the line of shell that runs launch/job.sh on a host.
job() {
  local action=$1
  shift
  quoted dreamllm_jax/launch/job.sh "$action" "$name" "$@"
}

start() {
  local words=("${command[@]}")
  # shellcheck disable=SC2088
  case ${words[0]} in python | python3) words[0]=.venv/bin/python ;; esac
  if [ ${#env_settings[@]} -gt 0 ]; then words=(env "${env_settings[@]}" "${words[@]}"); fi
  everywhere "$(job start -- "${words[@]}")"
}

logs() {
  local status=0
  on "${names[0]}" "$worker" "$(job logs)" || status=$?
  [ "$status" != 255 ] || fail "The connection was lost, but the job is still running; follow it again with logs."
  return "$status"
}

case $action in
  setup) setup ;;
  start) start ;;
  logs) logs ;;
  run) setup && start && logs ;;
  preflight) everywhere "cd dreamllm_jax && $(quoted launch/preflight.sh --platform tpu "${command[@]}")" ;;
  status | stop) everywhere "$(job "$action")" ;;
esac
