#!/usr/bin/env bash
# One sweep in one Slurm allocation: a Ray head and the sweep on the first node, a Ray worker on each other node.
#
#   sbatch cluster/slurm.sh                                              # sweeps/quickstart.yaml
#   sbatch --nodes=4 --gpus-per-node=4 cluster/slurm.sh sweeps/budgets.yaml data.name=parquet data.path=/shared/cifar10
#
# Submit it from the checkout. The same command continues where an earlier job stopped. Settings are environment variables:
#   MEA_RAY_VENV        virtual environment with mea_ray, on the shared disk (default: what is on PATH)
#   MEA_RAY_STORAGE     folder on the shared disk (default: mea_ray_results in the submission folder)
#   MEA_RAY_TMP         short path on each node's local disk, for the job's folder of Ray sockets (default: /tmp)
#   MEA_RAY_JOIN_S      seconds within which all nodes must have joined (default: 300)
#   MEA_RAY_RESTARTS    how often the job requeues itself at its time limit (default: 20)
#   MEA_RAY_WANDB_SYNC  1 uploads the offline W&B runs at the end; otherwise the command to do so is printed
#
#SBATCH --job-name=mea-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --output=mea-ray-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@300
# Request GPUs on the command line (--gpus-per-node=1): the script also runs in partitions without them.
set -euo pipefail

sweep=${1:-sweeps/quickstart.yaml}
shift || true
storage=${MEA_RAY_STORAGE:-$SLURM_SUBMIT_DIR/mea_ray_results}
wandb=offline
for setting in "$@"; do
  case $setting in
    storage=*) storage=${setting#storage=} ;;
    tracking.wandb=*) wandb=${setting#tracking.wandb=} ;;
  esac
done
if [[ -n ${MEA_RAY_VENV:-} ]]; then
  # shellcheck source=/dev/null
  . "$MEA_RAY_VENV/bin/activate"
fi
if [[ ! -f $sweep ]]; then
  echo "no file $sweep in $PWD; submit from the checkout, or name the sweep by its full path" >&2
  exit 2
fi

# An unguessable name: in a folder that others can write, they could create a known one first.
mkdir -p -- "${MEA_RAY_TMP:-/tmp}"
tmp=$(mktemp -d "${MEA_RAY_TMP:-/tmp}/mea-ray-XXXXXXXXXX")
export tmp
export RAY_USAGE_STATS_ENABLED=0 WANDB_MODE=offline PYTHONUNBUFFERED=1
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nothing to migrate at the end
unset RAY_ADDRESS # do not join another cluster of this user
# A secret of this job: other users of these nodes must not be able to run code in it.
RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE RAY_AUTH_TOKEN

say() { printf '%(%H:%M:%S)T %s\n' -1 "$*"; }

# Runs on every node, inside its job step. Ray gets exactly the resources that Slurm gave to that step.
# shellcheck disable=SC2329 # its text is passed to bash on the nodes
ray_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-0} seen memory=() pid status=0
  if [[ -n ${CUDA_VISIBLE_DEVICES:-} && $CUDA_VISIBLE_DEVICES != NoDevFiles ]]; then
    IFS=, read -ra seen <<< "$CUDA_VISIBLE_DEVICES" # numbers, UUIDs or MIG slices
    gpus=${#seen[@]}
  fi
  if (( ${SLURM_MEM_PER_NODE:-0} > 0 )); then # Ray would count all memory of a shared node
    memory=("--object-store-memory=$(( SLURM_MEM_PER_NODE * 1024 * 1024 * 3 / 10 ))")
  fi
  # It exists already on the first node. It must not be a link, or another user's.
  mkdir -p -- "${tmp%/*}"
  if ! mkdir -m 700 -- "$tmp" 2> /dev/null && [[ -L $tmp || ! -d $tmp || ! -O $tmp ]]; then
    echo "$tmp on $(hostname) cannot be created, or is not this user's; set MEA_RAY_TMP to another folder" >&2
    return 1
  fi
  ulimit -n "$(ulimit -Hn)"
  # Ports chosen by the system: nodes may be shared, also with other users' Ray.
  ray start "$@" --block --disable-usage-stats --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "${memory[@]}" &
  pid=$!
  trap 'kill -TERM "$pid" 2> /dev/null' TERM
  wait "$pid" || status=$?
  wait "$pid" 2> /dev/null || true # the first wait ends with the signal, this one with Ray
  rm -rf -- "$tmp"
  return "$status"
}

# Runs Ray in the background of srun. Not `ray stop`: it would also end other users' Ray on a shared node.
step() {
  local nodes=$1
  shift
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --overlap \
    --no-kill --kill-on-bad-exit=0 "$@" &
}

steps=()
stop_ray() {
  trap '' TERM USR1
  rmdir -- "$tmp" 2> /dev/null || true # nothing was started
  (( ${#steps[@]} )) || return 0
  # Signals the processes of the steps. (A TERM to srun would kill them before they clean up.)
  scancel --signal=TERM "$SLURM_JOB_ID" 2> /dev/null || kill -TERM "${steps[@]}" 2> /dev/null || true
  wait "${steps[@]}" 2> /dev/null || true
  steps=()
}
trap stop_ray EXIT

# This script runs on the first node. Gets its address as Ray sees it, and free ports.
read -r ip port client_port < <(python -c '
import importlib.util, socket, ray
with socket.socket() as a, socket.socket() as b:
    a.bind(("", 0)); b.bind(("", 0))
    client = b.getsockname()[1] if importlib.util.find_spec("grpc") else ""  # only then can Ray serve ray://
    print(ray.util.get_node_ip_address(), a.getsockname()[1], client)')
address=$ip:$port
nodes=$SLURM_JOB_NUM_NODES
node=$(declare -f ray_node)

# Waits until this many nodes are in the cluster, or fails if a step has ended.
await_nodes() {
  timeout "${MEA_RAY_JOIN_S:-300}" python - "$address" "$1" << 'PY' &
import logging
import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
while True:
    try:
        ray.init(address, logging_level=logging.CRITICAL, log_to_driver=False)
        break
    except (ConnectionError, RuntimeError):  # the head is not up yet
        time.sleep(1)
while sum(node["Alive"] for node in ray.nodes()) < wanted:
    time.sleep(1)
has = ray.cluster_resources()
print(f"Ray at {address}: {wanted} nodes, {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs", flush=True)
PY
  local joined=$!
  wait -n "$joined" "${steps[@]}" || true
  if kill "$joined" 2> /dev/null || ! wait "$joined"; then
    say "waiting for $1 of $nodes nodes failed: a step ended, or MEA_RAY_JOIN_S=${MEA_RAY_JOIN_S:-300} was too short"
    exit 1
  fi
}

step 1 --nodelist="$SLURMD_NODENAME" bash -c "$node; ray_node \"\$@\"" ray-head --head \
  --node-ip-address="$ip" --port="$port" ${client_port:+"--ray-client-server-port=$client_port"} \
  --include-dashboard=false --temp-dir="$tmp"
steps+=("$!")
await_nodes 1 # a worker that starts before the head has registered gives up
if (( nodes > 1 )); then
  step $(( nodes - 1 )) --exclude="$SLURMD_NODENAME" bash -c "$node; ray_node \"\$@\"" ray-worker --address="$address"
  steps+=("$!")
  await_nodes "$nodes"
fi

# With job control the sweep gets SIGINT, which background processes of a script ignore.
set -m
mea-ray sweep "$sweep" "storage=$storage" "tracking.wandb=$wandb" "$@" --resume --address "$address" &
driver=$!
set +m

# Sends the sweep a Ctrl-C, which loses nothing finished. USR1 precedes the time limit; TERM is from scancel or preemption.
signal=
# shellcheck disable=SC2329 # called by the traps
pass_on() {
  signal=$1
  say "SIG$1: stopping the sweep"
  kill -INT "$driver" 2> /dev/null || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
status=0
wait "$driver" || status=$?
if [[ -n $signal ]]; then # the first wait ended with the signal, this one with the sweep
  status=0
  wait "$driver" || status=$?
fi
stop_ray
trap - EXIT

if [[ $signal == USR1 && $status != 0 ]]; then
  if (( ${SLURM_RESTART_COUNT:-0} < ${MEA_RAY_RESTARTS:-20} )); then
    say "time limit reached: requeued, to continue from $storage"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
  fi
  say "time limit reached after the last restart; the same sbatch command continues from $storage"
fi
say "the sweep ended with exit code $status; results are in $storage"
sync=(wandb sync "$storage"/*/wandb/offline-run-*)
if [[ -d ${sync[2]} ]]; then
  if [[ ${MEA_RAY_WANDB_SYNC:-0} == 1 ]] && env -u WANDB_MODE "${sync[@]}"; then
    say "the W&B runs are uploaded"
  else
    say "to upload the W&B runs, on a node with Internet access: ${sync[*]:0:2} $storage/*/wandb/offline-run-*"
  fi
fi
exit "$status"
