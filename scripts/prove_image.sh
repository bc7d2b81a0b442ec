#!/usr/bin/env bash
# Proves the Dockerfile without a Docker engine; --help says how.
# shellcheck disable=SC2016  # the templates that buildah fills have dollars of their own
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: scripts/prove_image.sh [options]

Builds the CPU variant of the image with buildah on a Debian root that debootstrap makes, runs the quickstart
in it as the image's own user, with a read-only root and without a network, checks the report, prints sizes.
What the build needs of this machine (CA bundle, pip's settings, wheels) goes into that Debian root alone.

  --recipe NAME       bundled recipe to run                       (default: quickstart)
  --mirror URL        Debian mirror                               (default: this machine's, or Debian's own)
  --suite NAME        Debian release                              (default: bookworm)
  --ca-bundle FILE    certificates that the build trusts          (default: $SSL_CERT_FILE, or this machine's)
  --pip-conf FILE     becomes /etc/pip.conf of the Debian root    (default: indexes of `pip config list`)
  --wheels FOLDER     wheels offered to pip, such as torch for CPUs; "" for none
                                                                  (default: pip's find-links, where it is a folder)
  --work-dir FOLDER   a new folder below it holds everything; 30 GB (default: $TMPDIR, or /tmp)
  --keep              leave that folder: image, containers, run

Needs root, and: buildah debootstrap util-linux python3 (apt-get install buildah debootstrap).
http_proxy, https_proxy and no_proxy reach the build. The pip settings may hold passwords: so does then a kept folder.
TEXT
}

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
fail() {
  printf 'prove_image: %s\n' "$*" >&2
  exit 1
}
wrong() {
  printf 'prove_image: %s (see --help)\n' "$*" >&2
  exit 2
}

ROOT_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly ROOT_DIR IMAGE=localhost/posttrain:proof BASE=localhost/posttrain-proof-base
RECIPE=quickstart SUITE=bookworm KEEP=false WORK_PARENT=${TMPDIR:-/tmp}
MIRROR="" CA_BUNDLE=${SSL_CERT_FILE:-} PIP_CONF="" WHEELS=unset

read_options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --keep) KEEP=true && shift && continue ;;
      --recipe | --mirror | --suite | --ca-bundle | --pip-conf | --wheels | --work-dir) ;;
      *) wrong "no such option: $1" ;;
    esac
    [ $# -ge 2 ] || wrong "$1 needs a value"
    case $1 in
      --recipe) RECIPE=$2 ;;
      --mirror) MIRROR=$2 ;;
      --suite) SUITE=$2 ;;
      --ca-bundle) CA_BUNDLE=$2 ;;
      --pip-conf) PIP_CONF=$2 ;;
      --wheels) WHEELS=$2 ;;
      --work-dir) WORK_PARENT=$2 ;;
    esac
    shift 2
  done
}

check_machine() {
  local tool
  [ "$(id -u)" = 0 ] || wrong "mounting and debootstrap need root"
  for tool in buildah debootstrap unshare chroot setpriv python3; do
    command -v "$tool" > /dev/null || wrong "$tool is not installed"
  done
  [ -d "$WORK_PARENT" ] || wrong "--work-dir $WORK_PARENT is not a folder"
}

find_defaults() {
  local link
  if [ -z "$MIRROR" ]; then
    MIRROR=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null \
      | grep -Eo 'https?://[^ ]*/debian/?( |$)' | head -n 1 | tr -d ' ' || true)
    MIRROR=${MIRROR:-http://deb.debian.org/debian}
  fi
  [ -n "$CA_BUNDLE" ] || CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt
  [ -r "$CA_BUNDLE" ] || wrong "--ca-bundle $CA_BUNDLE cannot be read"
  if [ "$WHEELS" = unset ]; then
    WHEELS=""
    for link in $(pip_setting find-links); do
      if [ -d "$link" ]; then WHEELS=$link && break; fi
    done
  fi
  [ -z "$WHEELS" ] || [ -d "$WHEELS" ] || wrong "--wheels $WHEELS is not a folder"
  [ -z "$PIP_CONF" ] || [ -r "$PIP_CONF" ] || wrong "--pip-conf $PIP_CONF cannot be read"
}

pip_setting() { # NAME: its values in this machine's pip settings, those of the environment first
  python3 -m pip config list 2> /dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p"
}

write_pip_conf() { # indexes on this machine's disk are left out: the build does not see them
  local name value
  printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n'
  if [ -n "$WHEELS" ]; then printf 'find-links = /opt/wheels\n'; fi
  for name in index-url extra-index-url trusted-host proxy timeout; do
    value=$(pip_setting "$name" | grep -v '^file:' | head -n 1 || true)
    if [ -n "$value" ]; then printf '%s = %s\n' "$name" "$value"; fi
  done
}

make_base() { # a Debian that knows this machine's certificates, indexes and wheels, and nothing of posttrain
  local root=$WORK/debian container
  debootstrap --variant=minbase --include=ca-certificates "$SUITE" "$root" "$MIRROR" > "$WORK/debootstrap.log" 2>&1 \
    || { tail -n 20 "$WORK/debootstrap.log" >&2 && fail "debootstrap failed"; }
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/*
  if [ "$SUITE" != sid ] && [ "$SUITE" != unstable ]; then
    printf 'deb %s %s main\ndeb %s %s-updates main\n' "$MIRROR" "$SUITE" "$MIRROR" "$SUITE" > "$root/etc/apt/sources.list"
  fi
  cat "$CA_BUNDLE" > "$root/etc/ssl/certs/ca-certificates.crt"
  if [ -n "$PIP_CONF" ]; then cat "$PIP_CONF" > "$root/etc/pip.conf"; else write_pip_conf > "$root/etc/pip.conf"; fi
  if [ -n "$WHEELS" ]; then cp -rL "$WHEELS" "$root/opt/wheels"; fi
  container=$(buildah "${STORE[@]}" from scratch)
  buildah "${STORE[@]}" add --quiet "$container" "$root" / > /dev/null
  buildah "${STORE[@]}" commit --quiet "$container" "$BASE" > /dev/null
  buildah "${STORE[@]}" rm "$container" > /dev/null
  rm -rf "$root"
}

build_image() {
  buildah "${STORE[@]}" build --layers --pull-never --format oci --tag "$IMAGE" \
    --build-arg BASE_IMAGE="$BASE" --build-arg COMPILER="" \
    --build-arg REVISION="$(git -C "$ROOT_DIR" rev-parse HEAD 2> /dev/null || echo unknown)" \
    --file "$ROOT_DIR/Dockerfile" "$ROOT_DIR" > "$WORK/build.log" 2>&1 \
    || { tail -n 40 "$WORK/build.log" >&2 && fail "the build failed"; }
}

image_config() { buildah "${STORE[@]}" inspect --type image --format "$1" "$IMAGE"; }

open_image() { # how an engine would start the image, by the image's own words; a folder for each of its volumes
  local container volume
  mapfile -t ENVIRONMENT < <(image_config '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
  mapfile -t ENTRYPOINT < <(image_config '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' | sed '/^$/d')
  mapfile -t VOLUMES < <(image_config '{{range $name, $_ := .OCIv1.Config.Volumes}}{{println $name}}{{end}}' | sed '/^$/d')
  OWNER=$(image_config '{{.OCIv1.Config.User}}')
  FOLDER=$(image_config '{{.OCIv1.Config.WorkingDir}}')
  [ "${#ENTRYPOINT[@]}" -gt 0 ] || fail "the image has no entry point"
  [[ $OWNER =~ ^[0-9]+:[0-9]+$ ]] || fail "the image's user is '$OWNER', not UID:GID"
  container=$(buildah "${STORE[@]}" from --pull-never "$IMAGE")
  TREE=$(buildah "${STORE[@]}" mount "$container")
  for volume in "${VOLUMES[@]}"; do
    mkdir -p "$WORK/volumes$volume"
    chmod --reference="$TREE$volume" "$WORK/volumes$volume"
    chown --reference="$TREE$volume" "$WORK/volumes$volume"
  done
}

# Runs in namespaces of its own: TREE VOLUMES_DIR OWNER FOLDER VOLUME... -- NAME=VALUE... COMMAND...
enter() {
  local tree=$1 volumes=$2 owner=$3 folder=$4 device
  shift 4
  mount --bind "$tree" "$tree"
  while [ "$1" != -- ]; do
    mount --bind "$volumes$1" "$tree$1"
    shift
  done
  shift
  mount -t proc proc "$tree/proc"
  mount -t tmpfs -o mode=755 tmpfs "$tree/dev"
  for device in null zero full random urandom; do
    touch "$tree/dev/$device"
    mount --bind "/dev/$device" "$tree/dev/$device"
  done
  mkdir "$tree/dev/shm"
  mount -t tmpfs -o mode=1777,size=64m tmpfs "$tree/dev/shm"
  ln -s /proc/self/fd "$tree/dev/fd"
  mount -o remount,bind,ro "$tree"
  exec chroot "$tree" /usr/bin/setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --clear-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all /usr/bin/env -i /bin/sh -c 'cd "$1" && shift && exec env "$@"' sh "$folder" "$@"
}

inside_as() { # OWNER COMMAND...
  local owner=$1
  shift
  unshare --mount --pid --net --ipc --uts --fork --kill-child -- bash -euo pipefail -c \
    "$(declare -f enter); enter \"\$@\"" enter \
    "$TREE" "$WORK/volumes" "$owner" "$FOLDER" "${VOLUMES[@]}" -- "${ENVIRONMENT[@]}" "$@"
}
inside() { inside_as "$OWNER" "$@"; }

refuse_write() { # OWNER FILE WORDS: it cannot be made, and the reason holds these words
  local told
  if told=$(inside_as "$1" touch "$2" 2>&1); then fail "user $1 could write $2"; fi
  [[ $told == *"$3"* ]] || fail "user $1 could not write $2, but not since it is read-only: $told"
  echo "user $1 cannot write $2: ${told##*: }"
}

check_confinement() {
  local folder user
  user=$(inside id -u)
  [ "$user" != 0 ] || fail "the container runs as root"
  echo "runs as user $user"
  for folder in "" /opt/posttrain /work /usr; do
    refuse_write "$OWNER" "$folder/proof" "Read-only file system"
    refuse_write 0:0 "$folder/proof" "Read-only file system" # not even root: the mount refuses, not the modes
  done
  for folder in "${VOLUMES[@]}"; do
    inside touch "$folder/proof" || fail "user $OWNER cannot write $folder"
    inside rm "$folder/proof"
  done
  echo "can write ${VOLUMES[*]}"
  inside_as 4242:4242 "${ENTRYPOINT[@]}" rehearse "$RECIPE" --quiet --out /runs/rehearsal \
    || fail "a user that the image does not know cannot use it"
  echo "so can user 4242, who rehearsed $RECIPE"
}

check_report() {
  inside python - "/runs/$RECIPE/report/report.json" << 'PYTHON' || fail "the report does not hold"
import json, sys

report = json.load(open(sys.argv[1], encoding="utf-8"))
for gate in report["gates"]:
    print("passed" if gate["passed"] else "FAILED", gate["subject"], gate["bounds"], f"measured {gate['value']:.4g}")
sys.exit(0 if report["gates"] and all(gate["passed"] for gate in report["gates"]) else 1)
PYTHON
}

print_sizes() { # uncompressed; above the base there are the three layers that the Dockerfile's last stages make
  buildah "${STORE[@]}" inspect --type image "$IMAGE" > "$WORK/image.json"
  python3 - "$WORK/storage/vfs-layers/layers.json" "$WORK/image.json" << 'PYTHON'
import json, sys

layers = {layer["diff-digest"]: layer["diff-size"] for layer in json.load(open(sys.argv[1])) if "diff-digest" in layer}
sizes = [layers[digest] for digest in json.load(open(sys.argv[2]))["OCIv1"]["rootfs"]["diff_ids"]]
names = ["base"] * (len(sizes) - 3) + ["system packages", "dependencies", "package"]
for size, name in zip(sizes, names, strict=True):
    print(f"{size / 1e6:9.1f} MB  {name}")
print(f"{sum(sizes) / 1e6:9.1f} MB  in all, {sum(sizes[-3:]) / 1e6:.1f} MB above the base")
PYTHON
}

clean_up() {
  local status=$?
  if [ "$KEEP" = true ]; then
    echo "kept: $WORK"
  else
    buildah "${STORE[@]}" rm --all > /dev/null 2>&1 || true # unmounts
    rm -rf "$WORK"
  fi
  exit "$status"
}

main() {
  local began built
  read_options "$@"
  check_machine
  find_defaults
  WORK=$(mktemp -d "$WORK_PARENT/posttrain-proof-XXXXXX")
  STORE=(--root "$WORK/storage" --runroot "$WORK/run" --storage-driver vfs)
  export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs TMPDIR=$WORK
  trap clean_up EXIT
  trap 'exit 130' INT TERM

  say "Debian $SUITE"
  make_base
  say "build"
  began=$SECONDS
  build_image
  echo "built in $((SECONDS - began)) s"
  print_sizes
  image_config '{{range $name, $value := .OCIv1.Config.Labels}}{{$name}}={{$value}}{{println}}{{end}}' | sed '/^$/d'

  say "user, read-only root, volumes"
  open_image
  check_confinement
  say "$RECIPE"
  began=$SECONDS
  inside "${ENTRYPOINT[@]}" run "$RECIPE" || fail "$RECIPE failed inside the image"
  echo "ran in $((SECONDS - began)) s"
  check_report
  say "a second container on the same volumes"
  built=$(stat -c %i:%Y "$WORK/volumes/runs/$RECIPE/report/report.json")
  inside "${ENTRYPOINT[@]}" run "$RECIPE"
  [ "$(stat -c %i:%Y "$WORK/volumes/runs/$RECIPE/report/report.json")" = "$built" ] || fail "it ran finished stages again"
  du -sh "$WORK/volumes/runs" "$WORK/volumes/cache" | sed "s#$WORK/volumes##"
  say "proved"
}

main "$@"
