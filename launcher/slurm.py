"""The sbatch script of a job: `mme-launch run` once on each node, which meet on the first."""

from __future__ import annotations

import shlex
import sys

from launcher.job import Job
from launcher.torchrun import PREEMPTED
from mme.errors import UserError

# Ports below 20000 are often services', those from 32768 on the kernel's own choice for outgoing connections.
FIRST_PORT, NUM_PORTS = 20000, 12000

TEMPLATE = """\
#!/bin/bash
{directives}
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# All nodes meet on the first; a port of the job's own, so that two jobs on one node do not meet.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$(({first_port} + SLURM_JOB_ID % {num_ports}))

status=0
srun --kill-on-bad-exit=1 --ntasks-per-node=1 \\
    {command} \\
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node {nproc} \\
    --rdzv-endpoint "$head_node:$port" --max-restarts {max_restarts}{overrides} || status=$?

# {preempted}: asked to stop (the time limit is near, or the nodes are wanted elsewhere), with everything saved.
if [ "$status" -eq {preempted} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
OPTIONS = {"job-name": "name"}  # sbatch's name of an option → ours, where they differ
SIGNAL_BEFORE_END_S = 120  # more than workers have to write a checkpoint


def script(job: Job, *, name: str, gpus_per_node: int, log: str, options: dict[str, str | None]) -> str:
    """The text of the sbatch script; ``options``: further ones of sbatch, None: not given.

    Raises:
        UserError: a value for a directive holds a control character.
    """
    settings = {"job-name": name, "nodes": job.nnodes, "ntasks-per-node": 1, "output": log, "open-mode": "append"}
    if gpus_per_node:
        settings["gpus-per-node"] = gpus_per_node
    # A job that Slurm takes a node from is queued again, and goes on from its last checkpoint.
    given = settings | {option: value for option, value in options.items() if value is not None}
    for option, value in given.items():
        if not str(value).isprintable():  # a line break would end the comment, and what follows would run
            source = "output_dir" if option == "output" else f"--{OPTIONS.get(option, option)}"
            raise UserError(f"{source}: {str(value)!r} holds a control character, which no #SBATCH line can have")
    directives = [f"#SBATCH --{option}={shlex.quote(str(value))}" for option, value in given.items()]
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
