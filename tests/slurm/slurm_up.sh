#!/usr/bin/env bash
# Emulated SLURM nodes on this machine, for tests: slurm_up.sh FOLDER says `ready`, and SLURM is there for whoever sets
# SLURM_CONF=FOLDER/slurm.conf and MASTER_ADDR=127.0.0.1 (the nodes' names are known to SLURM alone) until the script's
# standard input ends. That is also when the process that holds its other end is killed: nothing is left behind.
# Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
# There is no accounting (sacct), which would need a database: a job that is cancelled is not noticed by submitit.
set -euo pipefail
FOLDER=$(mkdir -p "$1" && cd "$1" && pwd)
PORT=${SDFT_SLURM_PORT:-16900}   # of slurmctld; the nodes take the next three
HOST=$(hostname -s)
export SLURM_CONF=$FOLDER/slurm.conf
daemons=()

write_config() {
    mkdir -p "$FOLDER"/{log,pid,state,munge,node1,node2,node3}
    chmod 711 "$FOLDER/munge"
    (umask 077 && dd if=/dev/urandom of="$FOLDER/munge/key" bs=1024 count=1 status=none)
    cat > "$SLURM_CONF" <<CONF
ClusterName=sdft
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# Credentials that expire soon, and a scheduler that looks every second: a job is queued again in seconds.
AuthInfo=socket=$FOLDER/munge/socket,cred_expire=5
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmctldPort=$PORT
SlurmctldPidFile=$FOLDER/pid/slurmctld.pid
SlurmdPidFile=$FOLDER/pid/%n.pid
SlurmdSpoolDir=$FOLDER/%n
StateSaveLocation=$FOLDER/state
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/%n.log
MailProg=/bin/true
# No cgroups, no systemd, and more processors than there are.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait=30
MessageTimeout=60
PropagateResourceLimits=NONE
NodeName=DEFAULT CPUs=4 RealMemory=8000 Weight=2
NodeName=node1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 1))
NodeName=node2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2))
# The node that is to fail has no other jobs, and its own take it first.
NodeName=node3 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 3)) Weight=1
PartitionName=test Nodes=node1,node2 Default=YES
PartitionName=fragile Nodes=node1,node3
CONF
}

start() {  # a daemon in the foreground, which the shell can end
    "$@" < /dev/null > /dev/null 2>> "$FOLDER/log/started.log" &
    daemons+=($!)
}

all_idle() {
    [ "$(timeout 10 sinfo --noheader --Node --states=idle --format=%N 2> /dev/null | sort -u | wc -l)" = 3 ]
}

stop() {
    timeout 10 scancel --user=root 2> /dev/null || true
    while [ -n "$(timeout 10 squeue --noheader 2> /dev/null)" ]; do sleep 0.2; done  # their processes end first
    kill -KILL "${daemons[@]}" 2> /dev/null || true
}

write_config
trap stop EXIT
start munged --foreground --force --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" --num-threads=2 \
    --pid-file="$FOLDER/pid/munged.pid" --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge/seed"
start slurmctld -D -c
for node in node1 node2 node3; do start slurmd -D -N "$node"; done
until all_idle; do
    for daemon in "${daemons[@]}"; do
        kill -0 "$daemon" 2> /dev/null || { tail -n 20 "$FOLDER"/log/*.log >&2; exit 1; }
    done
    sleep 0.2
done
echo ready
cat > /dev/null
