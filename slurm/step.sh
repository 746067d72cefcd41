# Sourced by the batch scripts. `run_step COMMAND...` runs the command as a job step, and requeues the job if SLURM sent
# USR1 to this shell (before the time limit) and the command failed, or if the command exited with status 75.
# USR1 is forwarded to the command: training saves a checkpoint and exits with 75. Before Python has installed its
# handler, USR1 ends the process; the requeued job then resumes from the checkpoint before, if there is one.
PYTHON=${PYTHON:-.venv/bin/python}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not inherit it since SLURM 22.05

run_step() {
    local warned="" step="" status=0
    trap 'warned=yes; [ -z "$step" ] || kill -USR1 "$step" || true' USR1
    srun --kill-on-bad-exit=1 "$@" &
    step=$!
    [ -z "$warned" ] || kill -USR1 "$step" || true
    # A trapped signal interrupts `wait` before the step has ended: wait again while it runs.
    while wait "$step" && status=0 || status=$?; kill -0 "$step" 2>/dev/null; do :; done
    if [ "$status" -ne 0 ] && { [ -n "$warned" ] || [ "$status" -eq 75 ]; }; then
        echo "stopped early with status $status: queued again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    return "$status"
}
