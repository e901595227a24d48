#!/usr/bin/env bash
# Requests TPU slices from Google Cloud, waits for them, and deletes them:
# launch/tpu_queued_resource.sh create|wait|describe|delete NAME --zone ZONE [options]
#
#   create    queues a request for slices. One slice is named NAME; several are NAME-0, NAME-1, ...
#   wait      returns when the request is ACTIVE; the exit code is 1 if it failed or was preempted
#   describe  prints Google Cloud's description of the request
#   delete    deletes the request and its slices; you pay for them until then
#
#   --project P    the project (default: gcloud's)
#   --type T       create: v5p-128 is v5p:4x4x4 (the number counts cores, two a chip), v5litepod-256 is v5e:16x16
#   --runtime R    create: the TPU VM's image (default: the one for the type, if it is known)
#   --slices N     create: the number of slices, joined over the data centre's network (default 1)
#   --spot         create: cheaper, and may be preempted; then delete the request and create it again
#   --reserved     create: from a reservation of the project
#   --within D     create: give up if nothing is free within D, such as 6h
#   --poll S       wait: seconds between two checks (default 30)
#   --timeout S    wait: give up after S seconds (default: never)
#   --yes          delete: do not ask for confirmation
#   --dry-run      print the commands and run nothing
#
# Example: launch/tpu_queued_resource.sh create dream --zone us-east5-a --type v5p-128 --spot
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/cluster.sh
. "$here/cluster.sh"

action=${1:-}
case $action in
  create | wait | describe | delete) shift ;;
  -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
  *) fail "'$action' is not an action; give create, wait, describe or delete (see ${0##*/} --help)." ;;
esac
name='' zone='' project='' type='' runtime='' slices=1 within='' poll=30 timeout='' spot=0 reserved=0 yes=0
while [ $# -gt 0 ]; do
  case $1 in
    --zone | --project | --type | --runtime | --slices | --within | --poll | --timeout)
      with_value "$@"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --spot | --reserved | --yes) printf -v "${1#--}" 1 ;;
    --dry-run) dry=1 ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) fail "$1 is unknown; see ${0##*/} --help." ;;
    *)
      [ -z "$name" ] || fail "'$1' comes after the name $name; give one name."
      name=$1
      ;;
  esac
  shift
done
given "the NAME of the request" "$name"
given --zone "$zone"
for number in slices poll ${timeout:+timeout}; do
  case ${!number} in
    '' | *[!0-9]* | 0*) fail "--$number is '${!number}'; give a whole number, 1 or more." ;;
  esac
done
need gcloud "see cloud.google.com/sdk/docs/install"
gcloud=(gcloud compute tpus queued-resources)
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# The image of the TPU VM for a type, as Google's documentation names it (cloud.google.com/tpu/docs/runtimes).
runtime_for() {
  case $1 in
    v5p-*) say v2-alpha-tpuv5 ;;
    v5litepod-*) say v2-alpha-tpuv5-lite ;;
    v6e-*) say v2-alpha-tpuv6e ;;
    v4-*) say tpu-ubuntu2204-base ;;
    *) fail "The image for the type $1 is unknown; name it with --runtime." ;;
  esac
}

create() {
  local options
  given --type "$type"
  [ "$spot$reserved" != 11 ] || fail "--spot and --reserved exclude each other; give one."
  [ -n "$runtime" ] || runtime=$(runtime_for "$type")
  options=("--accelerator-type=$type" "--runtime-version=$runtime")
  if [ "$slices" = 1 ]; then
    options+=("--node-id=$name")
  else
    options+=("--node-count=$slices" "--node-prefix=$name")
  fi
  [ "$spot" = 0 ] || options+=(--spot)
  [ "$reserved" = 0 ] || options+=(--reserved)
  [ -z "$within" ] || options+=("--valid-until-duration=$within")
  run "${gcloud[@]}" create "$name" "${where[@]}" "${options[@]}"
}

wait_active() {
  local state last=
  if [ "$dry" = 1 ]; then
    run "${gcloud[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  SECONDS=0
  while :; do
    state=$("${gcloud[@]}" describe "$name" "${where[@]}" '--format=value(state.state)') ||
      fail "gcloud cannot describe the request $name in $zone; see its message above."
    [ "$state" = "$last" ] || say "$name: $state"
    last=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        fail "The request $name is $state: it failed or its slices were preempted; delete it, create it again, and" \
          "run the same training command, which resumes from its workdir."
        ;;
    esac
    [ -z "$timeout" ] || [ $((SECONDS + poll)) -le "$timeout" ] ||
      fail "The request $name is still $state after $SECONDS seconds; it stays queued until you delete it."
    sleep "$poll"
  done
}

case $action in
  create) create ;;
  wait) wait_active ;;
  describe) run "${gcloud[@]}" describe "$name" "${where[@]}" ;;
  delete)
    options=(--force) # its slices too
    [ "$yes" = 0 ] || options+=(--quiet)
    run "${gcloud[@]}" delete "$name" "${where[@]}" "${options[@]}"
    ;;
esac
