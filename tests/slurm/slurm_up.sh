#!/usr/bin/env bash
# Two emulated SLURM nodes on this machine, for tests: slurm_up.sh start|stop FOLDER; then `export SLURM_CONF=FOLDER/slurm.conf`.
# Needs root and Debian's packages: apt-get install -y --no-install-recommends slurm-wlm munge
# Everything lies in FOLDER, but for two lines `127.0.0.1 nodeK` in /etc/hosts: torch looks up the first node by name.
# There is no accounting (sacct), which would need a database: a job that is cancelled is not noticed by submitit.
set -euo pipefail
FOLDER=$(mkdir -p "$2" && cd "$2" && pwd)
PORT=${SDFT_SLURM_PORT:-16900}   # of slurmctld; the nodes take the next two
HOST=$(hostname -s)
export SLURM_CONF=$FOLDER/slurm.conf

write_config() {
    mkdir -p "$FOLDER"/{log,pid,state,munge,node1,node2}
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
KillWait=5
MessageTimeout=60
PropagateResourceLimits=NONE
NodeName=node1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 1)) CPUs=4 RealMemory=8000
NodeName=node2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=$((PORT + 2)) CPUs=4 RealMemory=8000
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
CONF
}

start() {
    write_config
    for node in node1 node2; do
        grep -qw "$node" /etc/hosts || echo "127.0.0.1 $node" >> /etc/hosts
    done
    munged --force --key-file="$FOLDER/munge/key" --socket="$FOLDER/munge/socket" --pid-file="$FOLDER/pid/munged.pid" \
        --log-file="$FOLDER/log/munged.log" --seed-file="$FOLDER/munge/seed" --num-threads=2
    slurmctld -c -f "$SLURM_CONF"
    slurmd -N node1 -f "$SLURM_CONF"
    slurmd -N node2 -f "$SLURM_CONF"
    for _ in $(seq 100); do
        [ "$(timeout 5 sinfo -h -N -t idle -o %N 2>/dev/null | wc -l)" = 2 ] && return 0
        sleep 0.2
    done
    tail -n 20 "$FOLDER"/log/*.log >&2
    return 1
}

stop() {
    timeout 10 scancel --user=root 2>/dev/null || true
    local file pid
    for file in "$FOLDER"/pid/{node1,node2,slurmctld,munged}.pid; do
        [ -f "$file" ] || continue
        pid=$(cat "$file")
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
    done
}

case "$1" in start) start ;; stop) stop ;; *) echo "slurm_up.sh start|stop FOLDER" >&2; exit 2 ;; esac
