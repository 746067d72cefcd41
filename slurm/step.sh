# Sourced by the batch scripts: `run_step COMMAND...` runs the command as a step of the job, and queues the job again
# when SLURM has warned it (USR1 to this shell, before the time limit) and it stopped early.
# The warning is passed on. Python saves and leaves with 75; where it has not got so far as to listen, USR1 ends it,
# and the job goes on from the checkpoint before: no moment of the job is without cover.
PYTHON=${PYTHON:-.venv/bin/python}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over by itself since SLURM 22.05

run_step() {
    local warned="" step="" status=0
    trap 'warned=yes; [ -z "$step" ] || kill -USR1 "$step" || true' USR1
    srun --kill-on-bad-exit=1 "$@" &
    step=$!
    [ -z "$warned" ] || kill -USR1 "$step" || true
    # A trapped signal interrupts `wait` before the step has ended.
    while wait "$step" && status=0 || status=$?; kill -0 "$step" 2>/dev/null; do :; done
    if [ "$status" -ne 0 ] && { [ -n "$warned" ] || [ "$status" -eq 75 ]; }; then
        echo "stopped early with status $status: queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
