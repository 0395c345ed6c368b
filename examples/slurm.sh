#!/bin/bash
# Runs a topology under Slurm, a job for each of its hosts, which are named like the nodes:
#
#   SBATCH_GPUS_PER_NODE=4 examples/slurm.sh three-hosts.toml a b c
#   scancel --name triptych
#
# The topology, its models and its keys lie where every node sees them, the state of a host on a disk of its node. The jobs
# may start in any order. The job of a lost node is queued again by Slurm, and runs when its node is back; within one job of
# all nodes it would not: with --no-kill that loses the node for ever. `scancel` leaves a host KillWait (30 s by default).
# Its kinds of components stop one after the other, so give shutdown_s at most 30 s divided by their number, or raise
# KillWait.
set -eu
file=$(realpath -- "$1")
shift
for host in "$@"; do
    up=$(printf '%q ' "${TRIPTYCH:-triptych}" up "$file" --host "$host")
    sbatch --job-name=triptych --nodelist="$host" --nodes=1 --ntasks=1 --requeue \
        --open-mode=append --output="${LOGS:-$PWD}/triptych-$host.log" <<END
#!/bin/bash
pause=1
while true; do
    begun=\$SECONDS
    srun --cpu-bind=none $up
    code=\$?
    [ \$code = 2 ] && exit 2 # it can never run as the topology says
    [ \$((SECONDS - begun)) -gt 60 ] && pause=1
    echo host $(printf %q "$host") "has ended with \$code, starting it again in \$pause s" >&2
    sleep \$pause
    pause=\$((pause < 30 ? 2 * pause : 60))
done
END
done
