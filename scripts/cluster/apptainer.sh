#!/usr/bin/env bash
# posttrain on a cluster that has Apptainer and, perhaps, no network.
#
#   docker save posttrain | gzip > posttrain.tar.gz             # where Docker is; copy the file over
#   apptainer.sh convert posttrain.tar.gz posttrain.sif         # once
#   apptainer.sh run posttrain.sif run RECIPE                   # in a job; any posttrain command
#
# POSTTRAIN_RUNS and POSTTRAIN_CACHE name the folders that are written to, POSTTRAIN_WORK that of your recipes
# and data, which is /work inside. HF_HUB_OFFLINE=1 is the default here: set it to 0 where the hub can be reached.
set -euo pipefail

runs=${POSTTRAIN_RUNS:-$PWD/runs}           # CHANGE: a disk with room, shared by the nodes
cache=${POSTTRAIN_CACHE:-$PWD/cache}        # CHANGE: where `hf download` put models and data sets
work=${POSTTRAIN_WORK:-$PWD}                # CHANGE
scratch=${TMPDIR:-/tmp}

convert() { # TAR[.gz] SIF
  local archive=$1 image=$2 unpacked=""
  [ -f "$archive" ] || { echo "apptainer.sh: there is no $archive: make it with docker save" >&2 && exit 2; }
  if gzip --test "$archive" 2> /dev/null; then # docker-archive wants a plain tar
    unpacked=$(mktemp "$scratch/posttrain-XXXXXX.tar")
    # shellcheck disable=SC2064  # the name of now
    trap "rm -f '$unpacked'" EXIT
    gzip --decompress --stdout "$archive" > "$unpacked"
  fi
  apptainer build "$image" "docker-archive:${unpacked:-$archive}"
}

# Variables of the cluster beat those of the image: what Slurm says stays, what names other folders goes.
# --no-mount keeps out the cluster's /tmp and current folder, --home makes the cache the home, as in the image.
run() { # SIF COMMAND...
  local image=$1
  shift
  mkdir -p "$runs" "$cache"
  unset PYTHONPATH PYTHONHOME HF_HOME XDG_CACHE_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR CUDA_CACHE_PATH \
    MPLCONFIGDIR TMPDIR
  exec apptainer run --nv --no-mount tmp,cwd --home "$cache:/cache" --pwd / \
    --bind "$runs:/runs" --bind "$scratch:/tmp" --bind "$work:/work:ro" \
    --env "HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}" "$image" "$@"
}

case ${1:-}:$# in
  convert:3) convert "$2" "$3" ;;
  run:[3-9] | run:[1-9][0-9]) run "${@:2}" ;;
  *) sed -n '4,6s/^# *//p' "${BASH_SOURCE[0]}" >&2 && exit 2 ;;
esac
