#!/usr/bin/env bash
# Proves `posttrain run --executor slurm` on a real Slurm: a private cluster of two nodes on this machine.
#
#     sudo scripts/prove_slurm.sh [FOLDER]     # about five minutes on two quiet cores; FOLDER is kept, a temporary one is not
#
# Needs root and Debian's packages (apt-get install slurmctld slurmd slurm-client munge); nothing of theirs that may
# run already is touched: own ports, own key, own state. `posttrain` must be importable by $PYTHON (default: python).
#
# It shows: a recipe that goes through the cluster from pretraining to an aligned model; a second submission that
# finds nothing to do; a job cancelled in the middle of training, submitted again, with the very bytes of one that was
# not; one that Slurm requeues by itself; a stage of two processes, on one node and on two; what the cluster refuses.
set -euo pipefail

PYTHON=${PYTHON:-python}
ROOT=$(cd "$(dirname "$0")/.." && pwd)
STEPS=(--set stages.base.trainer.max_steps=40 --set stages.sft.trainer.max_steps=200 --set stages.sft.trainer.save_steps=20
  --set stages.dpo.trainer.max_steps=8 --set runtime.threads=1 --set runtime.device=cpu)

fail() { echo "prove_slurm: $*" >&2; exit 1; }
say() { echo "== $(date +%T) $*"; }

missing=()
for program in munged slurmctld slurmd sbatch squeue scontrol scancel; do
  PATH=$PATH:/usr/sbin command -v "$program" > /dev/null || missing+=("$program")
done
[ ${#missing[@]} -eq 0 ] || fail "missing ${missing[*]}: apt-get install slurmctld slurmd slurm-client munge"
[ "$(id -u)" = 0 ] || fail "run it as root: slurmd starts jobs as their owner"
"$PYTHON" -c 'import posttrain' || fail "$PYTHON cannot import posttrain: set PYTHON"

PATH=$PATH:/usr/sbin
WORK=${1:-$(mktemp -d)}
mkdir -p "$WORK"/{state,spool,log}
WORK=$(cd "$WORK" && pwd)
HEAD=$(hostname -s) # the launcher meets at the first node's name, which must therefore resolve
PORT=$((20000 + RANDOM % 20000))

stop() {
  local code=$?
  [ $code -eq 0 ] || tail -n 15 "$WORK"/log/*.log "$WORK"/runs*/quickstart/.slurm/*/*.out 2> /dev/null >&2 || true
  scancel --user=root 2> /dev/null || true
  for _ in $(seq 60); do # a node that is gone leaves its jobs behind
    [ -n "$(squeue --noheader 2> /dev/null)" ] || break
    sleep 1
  done
  for file in "$WORK"/*.pid; do
    [ -e "$file" ] && kill "$(cat "$file")" 2> /dev/null || true
  done
  sleep 1
  [ -n "${1:-}" ] || rm -rf "$WORK"
  exit $code
}
cat > "$WORK/slurm.conf" << END
ClusterName=proof
SlurmctldHost=$HEAD(127.0.0.1)
SlurmctldPort=$PORT
AuthType=auth/munge
AuthInfo=socket=$WORK/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$WORK/state
SlurmdSpoolDir=$WORK/spool/%n
SlurmctldPidFile=$WORK/slurmctld.pid
SlurmdPidFile=$WORK/slurmd-%n.pid
SlurmctldLogFile=$WORK/log/slurmctld.log
SlurmdLogFile=$WORK/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
NodeName=$HEAD,${HEAD}-b NodeHostname=$HEAD NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + 2))] CPUs=2 State=UNKNOWN
PartitionName=proof Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
export SLURM_CONF=$WORK/slurm.conf
# shellcheck disable=SC2064  # the argument of now
trap "stop ${1:+kept}" EXIT # from here on: scancel speaks to our own cluster
(umask 077; head -c 1024 /dev/urandom > "$WORK/munge.key")
munged --force --key-file="$WORK/munge.key" --socket="$WORK/munge.socket" --pid-file="$WORK/munged.pid" \
  --log-file="$WORK/log/munged.log" --seed-file="$WORK/munged.seed"
slurmctld
for node in "$HEAD" "$HEAD-b"; do
  mkdir -p "$WORK/spool/$node"
  slurmd -N "$node"
done
for _ in $(seq 30); do
  [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] && break
  sleep 1
done
[ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] || fail "the nodes did not come up: $(sinfo)"
say "$(sbatch --version): $(sinfo --noheader --format='%D nodes, %c CPUs each, %T')"

submit() { # RUNS_DIR, options of `posttrain run`
  local runs=$1
  shift
  (cd "$ROOT" && "$PYTHON" -m posttrain run recipes/quickstart.yaml --runs-dir "$WORK/$runs" --executor slurm "${STEPS[@]}" "$@")
}
drained() { # waits until no job is left
  for _ in $(seq 600); do
    [ -z "$(squeue --noheader)" ] && return
    sleep 1
  done
  fail "jobs hang: $(squeue)"
}
job() { "$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$WORK/$1/quickstart/.slurm/jobs.json" "$2"; }
has() { [ -f "$WORK/$1/quickstart/$2/stage.json" ] || fail "$1/$2 was not finished"; }
until_checkpoint() {
  for _ in $(seq 600); do
    compgen -G "$WORK/$1/quickstart/$2.partial/checkpoints/checkpoint-*" > /dev/null && return
    sleep 0.2
  done
  fail "no checkpoint of $2 in $1"
}
begin_from_base() { # a run folder that holds the base alone
  mkdir -p "$WORK/$1/quickstart"
  cp -r "$WORK/runs/quickstart/base" "$WORK/$1/quickstart/"
}

say "a recipe from pretraining to an aligned model: one job for each stage"
submit runs --until aligned
drained
for stage in base sft instruct dpo aligned; do has runs "$stage"; done
[ "$(submit runs --until aligned)" = "nothing to submit: every stage is finished" ] || fail "it submitted again"

say "the ready-made job: the whole recipe in one allocation"
mkdir -p "$WORK/bin"
printf '#!/bin/sh\nexec "%s" -m posttrain "$@"\n' "$PYTHON" > "$WORK/bin/posttrain"
chmod +x "$WORK/bin/posttrain"
PATH=$WORK/bin:$PATH POSTTRAIN_RUNS=$WORK/runs sbatch --wait --gpus-per-node=0 --cpus-per-task=2 \
  --chdir="$ROOT" --output="$WORK/ready.out" "$ROOT/scripts/cluster/slurm.sbatch" recipes/quickstart.yaml "${STEPS[@]}" \
  --until aligned
grep "^aligned .*skipped" "$WORK/ready.out"

say "scancel in the middle of training, then the same command again"
begin_from_base cancelled
submit cancelled --until sft
until_checkpoint cancelled sft
if submit cancelled --until sft 2> "$WORK/beside.txt"; then fail "it submitted beside a running job"; fi
grep "jobs of this run are in the queue: sft ($(job cancelled sft))" "$WORK/beside.txt"
scancel "$(job cancelled sft)"
drained
[ ! -e "$WORK/cancelled/quickstart/sft" ] || fail "the stage was over before it was cancelled"
submit cancelled --until sft
drained
has cancelled sft
grep -h "resumes from its last checkpoint" "$WORK"/cancelled/quickstart/.slurm/2/sft.out
cmp "$WORK"/{runs,cancelled}/quickstart/sft/adapter_model.safetensors
say "the same bytes as without the interruption"

say "scontrol requeue in the middle of training: the job goes on by itself"
begin_from_base requeued
submit requeued --until sft
until_checkpoint requeued sft
scontrol requeue "$(job requeued sft)"
while [ "$(squeue --noheader --jobs="$(job requeued sft)" --format=%T)" != PENDING ]; do sleep 0.5; done
scontrol update JobId="$(job requeued sft)" StartTime=now # or it waits for two minutes
drained
has requeued sft
cmp "$WORK"/{runs,requeued}/quickstart/sft/adapter_model.safetensors

for spread in "num_processes: 2" "num_processes: 2, num_machines: 2"; do
  runs=spread-${spread//[^0-9]/}
  say "a stage with {$spread}"
  begin_from_base "$runs"
  submit "$runs" --until sft --set "stages.sft.runtime={$spread}"
  drained
  has "$runs" sft
  grep -h "^sft  *done" "$WORK/$runs"/quickstart/.slurm/1/sft.out
done

say "a stage on two nodes stops for scancel, and goes on"
begin_from_base stopped
SPREAD=(--until sft --set "stages.sft.runtime={num_processes: 2, num_machines: 2}")
submit stopped "${SPREAD[@]}"
until_checkpoint stopped sft
scancel --batch --signal=TERM "$(job stopped sft)"
drained
[ ! -e "$WORK/stopped/quickstart/sft" ] || fail "the stage was over before it was stopped"
echo "saved: $(find "$WORK/stopped/quickstart/sft.partial/checkpoints" -name "checkpoint-*" -printf '%f ') (every 20 steps, and at the stop)"
submit stopped "${SPREAD[@]}"
drained
has stopped sft
grep -h "resumes from its last checkpoint" "$WORK"/stopped/quickstart/.slurm/2/sft.out

say "what the cluster refuses leaves nothing behind"
if submit refused --set runtime.slurm.partition=moon 2> "$WORK/refused.txt"; then fail "it was taken"; fi
cat "$WORK/refused.txt"
grep -q "stage base: sbatch: .*partition" "$WORK/refused.txt"
[ -z "$(squeue --noheader)" ] || fail "something stayed in the queue"
[ ! -e "$WORK/refused/quickstart" ] || fail "a run folder stayed"
say "all of it holds"
