"""The sbatch script of a job. It starts `mme-launch run` once per node, with the rendezvous on the first node."""

from __future__ import annotations

import shlex
import sys

from launcher.job import Job
from mme.errors import UserError
from mme.run.exit_status import PREEMPTED

# Services often use ports below 20000, and the kernel picks ports from 32768 up for outgoing connections.
FIRST_PORT, NUM_PORTS = 20000, 12000

TEMPLATE = """\
#!/bin/bash
{directives}
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# The rendezvous is on the first node. Its port depends on the job's id, so that two jobs on one node do not collide.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({first_port} + SLURM_JOB_ID % {num_ports}))

status=0
srun --kill-on-bad-exit=1 --ntasks-per-node=1 \\
    {command} \\
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {nproc} \\
    --rdzv-endpoint "$head_node:$port" --max-restarts {max_restarts}{overrides} || status=$?

# Status {preempted}: the job was asked to stop (time limit or preemption) and has saved a checkpoint.
if [ "$status" -eq {preempted} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
OPTIONS = {"job-name": "name"}  # sbatch's name of an option → ours, where they differ
SIGNAL_BEFORE_END_S = 120  # longer than the workers' limit for writing a checkpoint


def script(job: Job, *, name: str, gpus_per_node: int, log: str, options: dict[str, str | None]) -> str:
    """The text of the sbatch script. ``options`` are further sbatch options; None leaves one out.

    Raises:
        UserError: a value for a directive contains a control character.
    """
    settings = {"job-name": name, "nodes": job.nnodes, "ntasks-per-node": 1, "output": log, "open-mode": "append"}
    if gpus_per_node:
        settings["gpus-per-node"] = gpus_per_node
    given = settings | {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if not str(value).isprintable():  # after a line break, the rest of the value would run as a command
            source = "output_dir" if option == "output" else f"--{OPTIONS.get(option, option)}"
            raise UserError(f"{source}: {str(value)!r} contains a control character, which a #SBATCH line cannot hold")
    directives = [f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in given.items()]
    # --requeue: after Slurm takes a node away, the job is queued again and resumes from its last checkpoint.
    directives += ["#SBATCH --exclusive", "#SBATCH --requeue", f"#SBATCH --signal=TERM@{SIGNAL_BEFORE_END_S}"]
    return TEMPLATE.format(
        directives="\n".join(directives),
        first_port=FIRST_PORT,
        num_ports=NUM_PORTS,
        command=shlex.join([sys.executable, "-m", "launcher", "run", "--config", str(job.config)]),
        nproc=job.nproc_per_node,
        preempted=PREEMPTED,
        max_restarts=job.max_restarts,
        overrides="".join(f" \\\n    {shlex.quote(override)}" for override in job.overrides),
    )
