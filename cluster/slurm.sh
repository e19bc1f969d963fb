#!/usr/bin/env bash
# Run a job on the machines of a Slurm allocation: Ray's head and the job on the first one, Ray on all.
#
#     sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh stage1 --config jobs/configs/full/stage1.yaml \
#         data.input=/shared/images run_dir=/shared/stage1 train.num_workers=32
#
# The environment that is active at `sbatch` has to exist on every machine, and the paths on a disk that
# all of them share. When the time limit comes, or the job is preempted, Slurm starts it again and the same
# command continues.
#SBATCH --job-name=vlv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch [OPTION ...] cluster/slurm.sh JOB [key=value ...]" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: SLURM_JOB_ID is not set: start this script by sbatch" >&2; exit 2; }

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${machines[0]}
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine get different ones
# Only who knows the token may run code on this Ray; srun passes the environment on.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
ip=$(srun --nodes=1 --ntasks=1 --nodelist="$head" \
    python -c 'import socket; print(socket.gethostbyname(socket.gethostname()))')

# Of the allocation, not of the machine, which is what Ray would count.
node=(--block --disable-usage-stats)
[ -z "${SLURM_CPUS_ON_NODE:-}" ] || node+=("--num-cpus=$SLURM_CPUS_ON_NODE")
[ -z "${SLURM_GPUS_ON_NODE:-}" ] || node+=("--num-gpus=$SLURM_GPUS_ON_NODE")

steps=()
end() { # Ray's machines, by their steps: `ray stop` would also end the Ray of another job
    [ ${#steps[@]} -eq 0 ] || kill -TERM "${steps[@]}" 2>/dev/null || true
    wait || true
}
trap end EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" --overlap \
    ray start --head "--node-ip-address=$ip" "--port=$port" --include-dashboard=false \
    "--temp-dir=/tmp/vlv-ray-$SLURM_JOB_ID" "${node[@]}" >&2 &
steps+=($!)
workers=$((${#machines[@]} - 1))
if [ "$workers" -gt 0 ]; then
    python -c '
import socket, sys, time
for _ in range(120):
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
        break
    except OSError:
        time.sleep(1)
else:
    sys.exit("error: the head of Ray did not start within two minutes: see the lines above")
' "$ip" "$port"
    srun "--nodes=$workers" "--ntasks=$workers" --exclude="$head" --overlap \
        ray start "--address=$ip:$port" "${node[@]}" >&2 &
    steps+=($!)
fi

# A job counts its actors when it starts, so all machines have to be there.
python -c '
import sys, time, ray
for _ in range(300):
    try:
        ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        found = sum(node["Alive"] for node in ray.nodes())
    except ConnectionError:
        found = 0
    if found >= int(sys.argv[2]):
        break
    time.sleep(1)
else:
    sys.exit(f"error: {found} of {sys.argv[2]} machines joined Ray within five minutes: see the lines above")
' "$ip:$port" "${#machines[@]}"

vlv "$@" "ray.address=$ip:$port" &
job=$!
asked=
trap 'asked=1; kill -TERM "$job" 2>/dev/null || true' TERM
status=0
wait "$job" || status=$?
if [ -n "$asked" ]; then # the first wait ended with the signal, the job saves its state
    status=0
    wait "$job" || status=$?
    [ "$status" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
