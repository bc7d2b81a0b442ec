#!/usr/bin/env bash
# Keeps copies of a folder of runs where they survive the machine, such as a bucket that is mounted.
#
#   mirror_runs.sh save RUNS STORE             copies RUNS into STORE
#   mirror_runs.sh watch RUNS STORE SECONDS    does so again and again, until it is asked to stop
#   mirror_runs.sh restore RUNS STORE          fills RUNS from the newest whole copy; does nothing if there is none
#
# There are two copies, written in turn, each with a list of its files and their sizes: whenever the machine
# dies, and in whatever order the bucket took the files, one of them is whole, and restore sees which.
set -euo pipefail

contents() { (cd "$1" && find . -type f -printf '%s %p\n' | LC_ALL=C sort); }

is_whole() { [ -f "$1.list" ] && [ -d "$1" ] && [ "$(tail -n +2 "$1.list")" = "$(contents "$1")" ]; }

age_of() { head -n 1 "$1.list" 2> /dev/null || echo 0; }

copy() { # makes TO what FROM is; moves only what differs, and asks of TO no owners and modes
  local from to
  from=$(realpath "$1") && to=$2
  mkdir -p "$to"
  (cd "$to" && find . -mindepth 1 -depth ! -exec test -e "$from/{}" \; -delete)
  cp --recursive --update --preserve=timestamps "$from/." "$to/"
}

save() { # into the older of the two
  local runs=$1 store=$2 target=$2/a
  if [ "$(age_of "$store/a")" -gt "$(age_of "$store/b")" ]; then target=$store/b; fi
  rm -f "$target.list"
  if ! copy "$runs" "$target"; then
    echo "mirror_runs: files went away while they were copied; the other copy stands until the next one" >&2
    return 0
  fi
  { date +%s%N && contents "$target"; } > "$target.list.new"
  mv "$target.list.new" "$target.list"
}

watch() {
  local runs=$1 store=$2 seconds=$3 stop=false sleeper=""
  # Whenever it comes, no sleep outlasts it: a process that is about to become one may lose any other signal.
  trap 'stop=true; kill -KILL "$sleeper" 2> /dev/null || true' TERM INT
  while [ "$stop" = false ]; do
    sleep "$seconds" > /dev/null 2>&1 & # it holds no pipe open
    sleeper=$!
    if [ "$stop" = false ]; then wait "$sleeper" 2> /dev/null || true; fi # a signal ends the wait, not a copy
    [ "$stop" = true ] || save "$runs" "$store"
  done
  kill -KILL "$sleeper" 2> /dev/null || true
}

restore() {
  local runs=$1 store=$2 copy newest=""
  for copy in "$store/a" "$store/b"; do
    if is_whole "$copy" && { [ -z "$newest" ] || [ "$(age_of "$copy")" -gt "$(age_of "$newest")" ]; }; then
      newest=$copy
    fi
  done
  if [ -z "$newest" ]; then
    echo "mirror_runs: nothing to restore"
    return 0
  fi
  copy "$newest" "$runs"
  echo "mirror_runs: restored the copy of $(date --date "@$(($(age_of "$newest") / 1000000000))" '+%F %T')"
}

case ${1:-}:$# in
  save:3 | restore:3 | watch:4) "$@" ;;
  *) sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac
