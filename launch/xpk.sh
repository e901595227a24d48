#!/usr/bin/env bash
# TPU slices on GKE through xpk (github.com/AI-Hypercomputer/xpk), which creates clusters and writes JobSets:
# launch/xpk.sh create-cluster|delete-cluster|list --cluster C --zone Z [options]
# launch/xpk.sh run NAME --cluster C --zone Z --type T --image I [options] -- COMMAND...
# launch/xpk.sh wait|delete NAME --cluster C --zone Z [options]
#
#   create-cluster  creates a GKE cluster with a node pool for each slice, or changes its number of slices
#   run             queues COMMAND for all hosts of the slices; it is restarted when a host is lost
#   list            shows what is queued and running
#   wait            waits for the end of a run (exit code 124: not within --timeout, 125: it failed)
#   delete          ends the run NAME
#   delete-cluster  deletes the cluster, and ends its costs
#
#   --project P      the project (default: gcloud's)
#   --type T         v5p-128 is v5p:4x4x4 (the number counts cores, two a chip), v5litepod-256 is v5e:16x16
#   --slices N       the number of slices (default 1)
#   --spot, --on-demand, --reservation R    create-cluster: where the slices come from; give one
#   --image I        run: a pushed image of launch/Dockerfile.tpu, built with --build-arg RUN_AS=0
#                    (xpk runs the image's own user, and libtpu needs root)
#   --env FILE       run: settings for the command, such as launch/env/tpu_v5p.env; they are printed first
#   --restarts N     run: the largest number of restarts (default 50)
#   --timeout S      wait: seconds (default: xpk's, a week)
#   --yes            delete, delete-cluster: do not ask for confirmation
#   --dry-run        print the commands and run nothing
#
# Attach a bucket or Filestore with `xpk storage attach --auto-mount`. The words of COMMAND are passed on unchanged.
# Example: launch/xpk.sh run dream --cluster pod --zone us-east5-a --type v5p-128 --image REGISTRY/dreamllm:1 -- \
#            python -m dreamllm_jax.train --config=configs/stage2.py:/mnt/all --workdir=/mnt/all/stage2
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/cluster.sh
. "$here/cluster.sh"

action=${1:-}
case $action in
  create-cluster | delete-cluster | list | run | wait | delete) shift ;;
  -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "'$action' is not an action; give create-cluster, run, list, wait, delete or delete-cluster (see --help)." ;;
esac
name='' cluster='' zone='' project='' type='' slices=1 image='' env='' restarts=50 timeout=''
capacity=() yes=0 command=()
while [ $# -gt 0 ]; do
  case $1 in
    --cluster | --zone | --project | --type | --slices | --image | --env | --restarts | --timeout)
      with_value "$@"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --reservation)
      with_value "$@"
      capacity+=("--reservation=$2")
      shift
      ;;
    --spot | --on-demand) capacity+=("$1") ;;
    --yes) yes=1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    --)
      shift
      command=("$@")
      break
      ;;
    -*) fail "$1 is unknown; see ${0##*/} --help (the hosts' command comes after --)." ;;
    *)
      [ -z "$name" ] || fail "'$1' comes after the name $name; the hosts' command comes after --."
      name=$1
      ;;
  esac
  shift
done
given --cluster "$cluster"
given --zone "$zone"
for number in slices restarts ${timeout:+timeout}; do
  case ${!number} in
    '' | *[!0-9]* | 0*) fail "--$number is '${!number}'; give a whole number, 1 or more." ;;
  esac
done
case $action in
  run | wait | delete) # xpk's rule for names (parser/validators.py)
    [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
      fail "'$name' is not a valid name of a run; give up to 40 of a-z, 0-9 and -, beginning with a letter and not" \
        "ending with -."
    ;;
  *) [ -z "$name" ] || fail "'$name' is unknown; $action does not take the name of a run." ;;
esac
if [ "$action" = run ]; then
  given --image "$image"
  [ ${#command[@]} -gt 0 ] || fail "The command is missing; give it after -- (see ${0##*/} --help)."
  check_workdir "${command[@]}"
else
  [ ${#command[@]} = 0 ] || fail "$action does not take a command; run does."
  [ -z "$env" ] || fail "--env is only for run, whose command gets the settings."
fi
case $action in run | create-cluster) given --type "$type" ;; esac
if [ "$action" = create-cluster ]; then
  [ ${#capacity[@]} = 1 ] || fail "Give one of --spot, --on-demand and --reservation R, where the slices come from."
else
  [ ${#capacity[@]} = 0 ] || fail "${capacity[0]} is for create-cluster; a run takes the slices of its cluster."
fi
[ -z "$env" ] || load_env "$env"
need xpk "pip install xpk, see github.com/AI-Hypercomputer/xpk"
where=("--cluster=$cluster" "--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")
slice=("--tpu-type=$type" "--num-slices=$slices")
if [ "$yes" = 1 ]; then quietly=(--force); else quietly=(); fi

case $action in
  create-cluster) run xpk cluster create "${where[@]}" "${slice[@]}" "${capacity[@]}" ;;
  delete-cluster) run xpk cluster delete "${where[@]}" "${quietly[@]}" ;;
  list) run xpk workload list "${where[@]}" ;;
  wait)
    run xpk workload list "${where[@]}" "--wait-for-job-completion=$name" ${timeout:+"--timeout=$timeout"}
    ;;
  delete) run xpk workload delete "${where[@]}" "--workload=$name" "${quietly[@]}" ;;
  run)
    settings=()
    for setting in "${env_settings[@]}"; do settings+=("--env=$setting"); done
    # xpk takes the exit code of JAX after the loss of another host for a failure of the user's code.
    run xpk workload create "${where[@]}" "${slice[@]}" "--workload=$name" "--docker-image=$image" \
      "--max-restarts=$restarts" --restart-on-user-code-failure --termination-grace-period-seconds=300 \
      "${settings[@]}" "--command=cd /opt/dreamllm_jax && $(quoted "${command[@]}")"
    ;;
esac
