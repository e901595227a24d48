#!/usr/bin/env bash
# Checks this host before a paid run: launch/preflight.sh [options]
#
#   devices   JAX sees the expected devices. On a slice of several hosts run this on all of them at once
#             (launch/tpu_vm_run.sh preflight): the chips of a slice start together
#   versions  Python and the packages are those of launch/constraints
#   disk      the workdir has enough free space
#   bucket    a file can be written, read and deleted in the storage that all hosts share
#   clock     this host's clock is right: certificates and the order of checkpoints depend on it
#
#   --platform P   tpu, cuda or cpu (default: whatever JAX finds)
#   --devices N    the number of devices on this host (default: one or more)
#   --workdir W    the folder of the training run (default: the current folder)
#   --need G       GiB that must be free there (default 200, for two checkpoints of a 7B model with Adam in float32,
#                  12 bytes a weight, and 30 GiB for weights and pictures; give 340 for 13B)
#   --bucket B     a mounted or shared folder, or gs://BUCKET/FOLDER (through gcloud); default: not checked
#   --clock URL    compare with the clock of this web server (default: ask chrony or systemd)
#   --timeout S    seconds that JAX may take to find its devices (default 300)
#   --dry-run      print what would be checked and check nothing
#
# Prints one line for each check; the exit code is 1 if any failed. PYTHON names the Python (default: that of .venv).
# Example: launch/preflight.sh --platform tpu --devices 4 --workdir /mnt/runs/stage2 --bucket /mnt/runs
set -euo pipefail
here=${BASH_SOURCE[0]%/*}
[ "$here" != "${BASH_SOURCE[0]}" ] || here=.
# shellcheck source=launch/python.sh
. "$here/python.sh"
# shellcheck source=launch/cluster.sh
. "$here/cluster.sh"

platform='' devices='' workdir=. need=200 bucket='' clock='' timeout=300 failed=0
while [ $# -gt 0 ]; do
  case $1 in
    --platform | --devices | --workdir | --need | --bucket | --clock | --timeout)
      with_value "$@"
      printf -v "${1#--}" '%s' "$2"
      shift
      ;;
    --dry-run) dry=1 ;;
    -h | --help) usage "${BASH_SOURCE[0]}" && exit 0 ;;
    *) fail "$1 is unknown; see ${0##*/} --help." ;;
  esac
  shift
done
case $platform in
  '' | tpu | cuda | cpu) ;;
  *) fail "--platform is '$platform'; give tpu, cuda or cpu." ;;
esac
for number in ${devices:+devices} need timeout; do
  case ${!number} in
    '' | *[!0-9]* | 0*) fail "--$number is '${!number}'; give a whole number, 1 or more." ;;
  esac
done
case $clock in
  '' | http://?* | https://?*) ;;
  *) fail "--clock is '$clock'; give an address such as https://HOST." ;;
esac
case $bucket in
  gs://?*) ;;
  *://*) fail "--bucket is '$bucket'; give a folder or gs://BUCKET/FOLDER." ;;
esac
python=${PYTHON:-$venv/bin/python}
purpose=${platform:-runtime}
[ "$purpose" != cpu ] || purpose=runtime
install="launch/install.sh $purpose"

good() { say "ok      $1: ${*:2}"; }
bad() {
  failed=1
  say "FAILED  $1: ${*:2}"
}

has_python() {
  if command -v "$python" >/dev/null; then return 0; fi
  bad "$1" "there is no $python; $install creates it, or name another with PYTHON."
  return 1
}

# SIGALRM ends it wherever it waits: libtpu waits for the other hosts of a slice without a limit.
devices_of_jax='
import signal, sys
signal.alarm(int(sys.argv[1]))
import jax
local = jax.local_devices()
print(jax.default_backend().replace("gpu", "cuda"), len(local), jax.device_count(), local[0].device_kind)'

check_devices() {
  local found status=0 backend here all kind wanted
  has_python devices || return 0
  found=$("$python" -c "$devices_of_jax" "$timeout" 2>"$scratch/jax") || status=$?
  if [ "$status" = 142 ]; then
    bad devices "JAX found none within $timeout s; start this on all hosts of the slice at once, and check whether" \
      "another process holds the chips."
    return
  elif [ "$status" != 0 ]; then
    bad devices "JAX does not start: $(tail -n 1 "$scratch/jax"); install it with $install, and check whether another" \
      "process holds the chips."
    return
  fi
  read -r backend here all kind <<<"$(tail -n 1 <<<"$found")"
  wanted=${devices:-$here}
  if [ "$backend" != "${platform:-$backend}" ]; then
    bad devices "JAX runs on $backend, not on $platform; $install installs the missing packages, and JAX_PLATFORMS" \
      "(now '${JAX_PLATFORMS-}') must allow it."
  elif [ "$here" != "$wanted" ]; then
    bad devices "JAX sees $here on this host, not $wanted; check which are visible to this process" \
      "(CUDA_VISIBLE_DEVICES, TPU_VISIBLE_CHIPS) and whether one is broken."
  else
    good devices "$here on this host, $all in all ($backend, $kind)."
  fi
}

pins_and_packages='
import re, sys, tomllib
from importlib import metadata
from pathlib import Path
root, purpose = Path(sys.argv[1]), sys.argv[2]
version = "%d.%d" % sys.version_info[:2]
path = root / "launch" / "constraints" / ("py" + version.replace(".", "") + ".txt")
if not path.exists():
    sys.exit(f"Python is {version}, for which {path.parent} has no versions")
name = lambda text: re.sub("[-_.]+", "-", re.match("[A-Za-z0-9_.-]+", text)[0]).lower()
pins = {name(line): line.strip().split("==")[1] for line in path.read_text().splitlines() if "==" in line}
found = reversed(list(metadata.distributions()))  # the first is what is imported
here = {name(one.metadata["Name"]): one.version.split("+")[0] for one in found}
project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
needed = {name(line) for line in project["dependencies"]} | {"jaxlib"}
needed |= {"tpu": {"libtpu"}, "cuda": {"jax-cuda13-plugin", "jax-cuda13-pjrt"}}.get(purpose, set())
pins |= dict.fromkeys(("jax-cuda13-plugin", "jax-cuda13-pjrt"), pins["jaxlib"])
wrong = [f"{one} is missing" for one in sorted(needed - set(here))]
both = sorted(set(pins) & set(here))
wrong += [f"{one} is {here[one]}, not {pins[one]}" for one in both if here[one] != pins[one]]
if wrong:
    sys.exit(", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""))
print("Python " + version + "".join(f", {one} {here[one]}" for one in ("jax", "jaxlib", "libtpu") if one in here))'

check_versions() {
  local found
  has_python versions || return 0
  if found=$("$python" -c "$pins_and_packages" "$root" "$purpose" 2>"$scratch/versions"); then
    good versions "$found, as pinned."
  else
    bad versions "$(tail -n 1 "$scratch/versions"); $install installs what is pinned."
  fi
}

check_disk() {
  local folder=$workdir free
  while [ ! -e "$folder" ] && [ "$folder" != "${folder%/*}" ]; do folder=${folder%/*}; done # made when it runs
  if [ -n "$folder" ] && [ ! -e "$folder" ]; then folder=.; fi
  free=$(df -Pk "${folder:-/}" 2>"$scratch/disk" | awk 'NR == 2 { print int($4 / 1048576) }') || free=
  if [ -z "$free" ]; then
    bad disk "df fails for $workdir: $(tail -n 1 "$scratch/disk"); give a folder of this host with --workdir."
  elif [ "$free" -lt "$need" ]; then
    bad disk "$free GiB are free at $workdir, but $need are needed; give another --workdir, or add a disk."
  else
    good disk "$free GiB are free at $workdir ($need are needed)."
  fi
}

check_bucket() {
  local word probe
  word="$(hostname)-$$-$RANDOM"
  probe=${bucket%/}/preflight-$word
  printf '%s\n' "$word" >"$scratch/probe"
  case $bucket in
    gs://*)
      if ! command -v gcloud >/dev/null; then
        bad bucket "gcloud is not installed: see cloud.google.com/sdk/docs/install, or give the folder where the" \
          "bucket is mounted."
        return
      fi
      put() { gcloud storage cp "$scratch/probe" "$probe" </dev/null; }
      get() { gcloud storage cat "$probe" </dev/null; }
      remove() { gcloud storage rm "$probe" </dev/null; }
      ;;
    *)
      put() { cat "$scratch/probe" >"$probe"; }
      get() { cat "$probe"; }
      remove() { rm "$probe"; }
      ;;
  esac
  if ! put >/dev/null 2>"$scratch/said"; then
    bad bucket "$bucket is not writable: $(tail -n 1 "$scratch/said"); give this host's account permission to create," \
      "read and delete there."
  elif [ "$(get 2>"$scratch/said")" != "$word" ]; then
    bad bucket "the content of $probe is not what was written; give this host's account permission to read."
  elif ! remove >/dev/null 2>"$scratch/said"; then
    bad bucket "$probe cannot be deleted: $(tail -n 1 "$scratch/said"); nor could old checkpoints. Give this" \
      "host's account permission to delete."
  else
    good bucket "files in $bucket can be written, read and deleted."
  fi
}

skew_to='
import email.utils, sys, time, urllib.error, urllib.request
before = time.time()
try:
    answer = urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=20)
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    sys.exit(str(error))
date = answer.headers["Date"]
if date is None:
    sys.exit("its answer has no Date header")
print(round((before + time.time()) / 2 - email.utils.parsedate_to_datetime(date).timestamp()))'

check_clock() {
  local skew state
  if [ -n "$clock" ]; then
    has_python clock || return 0
    if ! skew=$("$python" -c "$skew_to" "$clock" 2>"$scratch/clock"); then
      bad clock "$clock did not send the time: $(tail -n 1 "$scratch/clock"); give another --clock."
    elif [ "${skew#-}" -gt 5 ]; then # the header counts seconds, and the answer travels
      bad clock "this host is $skew s away from $clock; enable chrony (apt-get install chrony)."
    else
      good clock "within 5 s of $clock."
    fi
  elif command -v chronyc >/dev/null; then
    state=$(chronyc tracking 2>&1) || state="Leap status : ${state:-chronyc failed}"
    case $state in
      *Leap*status*:*Normal*) good clock "chrony is synchronized with a server." ;;
      *)
        bad clock "chrony is not synchronized: $(tail -n 1 <<<"$state"); run systemctl restart chrony, or give" \
          "--clock URL."
        ;;
    esac
  elif command -v timedatectl >/dev/null; then
    case $(timedatectl show -p NTPSynchronized --value 2>&1) in
      yes) good clock "systemd reports that it is synchronized." ;;
      *)
        bad clock "systemd does not report that it is synchronized; run timedatectl set-ntp true, or give --clock URL."
        ;;
    esac
  else
    bad clock "this host has neither chrony nor systemd; give --clock URL."
  fi
}

if [ "$dry" = 1 ]; then
  say "devices: $python asks JAX for ${devices:-one or more} on this host (${platform:-any platform})"
  say "versions: of $python against launch/constraints"
  say "disk: $need GiB free at $workdir"
  say "bucket: ${bucket:-not checked}"
  say "clock: by ${clock:-chrony or systemd}"
  exit 0
fi
scratch=$(mktemp -d "${TMPDIR:-/tmp}/preflight.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
check_devices
check_versions
check_disk
if [ -n "$bucket" ]; then check_bucket; else say "-       bucket: not checked (--bucket)."; fi
check_clock
exit "$failed"
