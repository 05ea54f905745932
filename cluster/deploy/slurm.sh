#!/bin/bash
# A Ray cluster inside one Slurm job, with a token of its own, and a verb of this project on it:
#     sbatch --nodes=4 cluster/deploy/slurm.sh run /shared/audit.yaml [key=value ...]
# The exit code is the verb's: 0, 1, or 2 for more persons found than assess.limit allows. A job that was cut short goes
# on when the same line is given again. Not tried on a Slurm cluster: docs/cluster.md says what was.
#SBATCH --job-name=unveil
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
# Cores and memory of each node; with GPUs add: --gpus-per-node=1 (and embed.encode.gpus=1 search.shards.gpus=1).
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=08:00:00
# The log holds counts and places, no names.
#SBATCH --output=unveil-%j.log
set -euo pipefail
umask 077

if [ "$#" -lt 2 ]; then
  echo "usage: sbatch --nodes=N cluster/deploy/slurm.sh VERB CONFIG [key=value ...]" >&2
  exit 1
fi

# Where Python and this project are installed; every node must see it, and the run folder, sets and models too.
if [ -n "${UNVEIL_VENV:-}" ]; then
  # shellcheck disable=SC1091
  . "$UNVEIL_VENV/bin/activate"
fi

# This script runs on the first node. Its address in the cluster's own network; set UNVEIL_INTERFACE to choose (ib0).
if [ -n "${UNVEIL_INTERFACE:-}" ]; then
  address=$(ip -4 -o addr show "$UNVEIL_INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
else
  address=$(hostname --ip-address | tr ' ' '\n' | grep -v '^127\.' | head -n 1)
fi
case "$address" in
  10.* | 192.168.* | 172.1[6-9].* | 172.2[0-9].* | 172.3[01].* | 100.6[4-9].* | 100.[7-9]?.* | 100.1[01]?.* | 100.12[0-7].*) ;;
  *) echo "unveil: $address is not a private address; set UNVEIL_INTERFACE to a private interface" >&2; exit 1 ;;
esac
port=$((20000 + SLURM_JOB_ID % 20000))
first="${SLURMD_NODENAME:-$(hostname --short)}"

# The token: in a file that only you can read, in your home, which all nodes see. Its path is passed on, never itself.
folder="$HOME/.unveil"
mkdir -p "$folder"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$folder/slurm-$SLURM_JOB_ID.token"
export RAY_USAGE_STATS_ENABLED=0
started=()
scratch=""
end() {
  code=$?
  trap - EXIT
  kill "${started[@]}" 2> /dev/null || true
  wait || true
  if [ -n "$scratch" ]; then
    srun --overlap --ntasks-per-node=1 rm -rf "$scratch" || true
  fi
  rm -f "$RAY_AUTH_TOKEN_PATH"
  exit "$code"
}
trap end EXIT

head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' > "$RAY_AUTH_TOKEN_PATH"

# Ray's own folder on each node lies in a private one, which goes with the job.
scratch="/tmp/unveil-slurm-$SLURM_JOB_ID"
srun --overlap --ntasks-per-node=1 mkdir -m 700 "$scratch"

# The head: its dashboard on loopback only, its other ports on the private address, all of them asking for the token.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$first" \
  ray start --head --block --node-ip-address="$address" --port="$port" --dashboard-host=127.0.0.1 \
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --temp-dir="$scratch/r" &
started+=("$!")
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  sleep "${UNVEIL_HEAD_SECONDS:-15}"  # until the head listens
  srun --overlap --nodes="$((SLURM_JOB_NUM_NODES - 1))" --ntasks-per-node=1 --exclude="$first" \
    ray start --block --address="$address:$port" --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --temp-dir="$scratch/r" &
  started+=("$!")
fi

# The verb waits for the cluster: until all nodes have joined, or two minutes.
for _ in $(seq 24); do
  joined=$(python -c 'import ray, sys; ray.init(sys.argv[1]); print(len(ray.nodes()))' "$address:$port" 2> /dev/null || echo 0)
  if [ "$joined" -ge "$SLURM_JOB_NUM_NODES" ]; then
    break
  fi
  sleep "${UNVEIL_WAIT_SECONDS:-5}"
done
unveil "$@" ray.address="$address:$port"
