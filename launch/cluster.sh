# shellcheck shell=bash
# Shared by the scripts for clusters: --dry-run, --env FILE, and the errors for missing arguments.
#
# Source it after python.sh; it uses say and fail. `run` prints a command and runs it; with dry=1 it only prints.
# `load_env FILE` prints the settings of a file of launch/env and keeps them in env_settings.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail "bash is $BASH_VERSION, but 4.4 or later is needed; on macOS, which has 3.2, run brew install bash."

dry=0
env_settings=() # NAME=VALUE, one per variable

# quoted WORD... : prints the words, quoted for a shell.
quoted() {
  local word line=
  for word; do
    case $word in '' | *[!A-Za-z0-9_@%+=:,./-]*) word=${word@Q} ;; esac
    line="$line${line:+ }$word"
  done
  printf '%s' "$line"
}

# run COMMAND...: prints the command on standard error and runs it. A dry run only prints it, on standard output.
run() {
  if [ "$dry" = 1 ]; then
    say "$(quoted "$@")"
  else
    say "+ $(quoted "$@")" >&2
    "$@"
  fi
}

# need TOOL HOW: fails with instructions if the tool is not on the PATH. A dry run needs no tool.
need() {
  [ "$dry" = 1 ] || command -v "$1" >/dev/null ||
    fail "$1 is not installed: $2; --dry-run shows the commands without it."
}

# given NAME VALUE: fails if a required argument is missing.
given() {
  [ -n "$2" ] || fail "$1 is missing; give it, or see ${0##*/} --help."
}

# with_value NAME WORDS...: fails if the option NAME is not followed by a value.
with_value() {
  case ${2---} in --*) ;; *) return 0 ;; esac
  fail "$1 has no value; give one after it, or see ${0##*/} --help."
}

# usage FILE: prints the comment at the head of a script, its --help.
usage() {
  local line
  while IFS= read -r line; do
    case $line in
      '#!'* | '# shellcheck'*) ;;
      '#'*)
        line=${line#'#'}
        say "${line# }"
        ;;
      *) return 0 ;;
    esac
  done <"$1"
}

# add_setting NAME VALUE: joins the values of XLA_FLAGS and of LIBTPU_INIT_ARGS; other names may occur once.
add_setting() {
  local i
  for i in "${!env_settings[@]}"; do
    case ${env_settings[i]} in
      "$1="*)
        case $1 in
          XLA_FLAGS | LIBTPU_INIT_ARGS) env_settings[i]="${env_settings[i]} $2" ;;
          *) fail "--env sets $1 twice; only XLA_FLAGS and LIBTPU_INIT_ARGS may have several lines." ;;
        esac
        return
        ;;
    esac
  done
  env_settings+=("$1=$2")
}

# load_env FILE: reads a file of launch/env and prints what will be set where the command runs. The variables of
# this machine are not passed on.
load_env() {
  local line name number=0 setting
  [ -r "$1" ] || fail "--env $1 cannot be read; give a file such as launch/env/tpu_v5p.env."
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    case $line in
      '' | '#'*) continue ;;
      [A-Z]*=?*) name=${line%%=*} ;;
      *) fail "$1, line $number, is not NAME=VALUE: $line." ;;
    esac
    case $name in *[!A-Z0-9_]*) fail "$1, line $number: $name is not the name of a variable (A-Z, 0-9, _)." ;; esac
    add_setting "$name" "${line#*=}"
  done <"$1"
  say "Set by --env $1:" >&2
  for setting in "${env_settings[@]}"; do say "  $setting" >&2; done
}

# remote_command WORD...: prints one line for a remote shell, the settings and then the command.
remote_command() {
  local words=()
  if [ ${#env_settings[@]} -gt 0 ]; then words=(env "${env_settings[@]}"); fi
  quoted "${words[@]}" "$@"
}

# check_workdir WORD...: refuses the address of a bucket as a --workdir: training would take it for a folder.
check_workdir() {
  local word previous=
  for word; do
    case $previous$word in
      --workdir=*://* | --workdir*://*)
        fail "$word is the address of a bucket, but training needs a folder; mount the bucket on every host" \
          "(gcsfuse) and give its folder."
        ;;
    esac
    previous=
    [ "$word" != --workdir ] || previous=$word
  done
}
