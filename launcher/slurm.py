"""The sbatch script of a job. It starts `mme-launch run` once per node, with the rendezvous on the first node."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

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
OPTIONS = {"job-name": "name", "nodes": "nnodes"}  # sbatch's name of an option → ours, where they differ
OPTION = re.compile(r"(?:--)?([a-z][a-z0-9-]*)(?:=(.*))?", re.DOTALL)
# The script relies on these, so they cannot be set through --sbatch.
OURS = ("ntasks-per-node", "ntasks", "array", "open-mode", "signal", "requeue", "no-requeue", "chdir", "wrap")
OWN_OPTIONS = ("job-name", "nodes", "gpus-per-node", "partition", "account", "time", "output")
SIGNAL_BEFORE_END_S = 120  # longer than the workers' limit for writing a checkpoint


def script(
    job: Job,
    *,
    name: str,
    gpus_per_node: int,
    log: str,
    options: dict[str, str | None],
    further: Sequence[str] = (),
) -> str:
    """The text of the sbatch script.

    Args:
        options: sbatch options that the launcher knows; None leaves one out.
        further: any other ones, as OPTION or OPTION=VALUE.

    Raises:
        UserError: a value for a directive contains a control character, or a further option is malformed or set elsewhere.
    """
    passed_on = dict(_option(text) for text in further)
    settings = {"job-name": name, "nodes": job.nnodes, "ntasks-per-node": 1, "output": log, "open-mode": "append"}
    if gpus_per_node:
        settings["gpus-per-node"] = gpus_per_node
    given = settings | {option: value for option, value in options.items() if value is not None} | passed_on
    for option, value in given.items():
        if not str(value).isprintable():  # after a line break, the rest of the value would run as a command
            source = "output_dir" if option == "output" else f"--{OPTIONS.get(option, option)}"
            source = f"--sbatch {option}" if option in passed_on else source
            raise UserError(f"{source}: {str(value)!r} contains a control character, which a #SBATCH line cannot hold")
    directives = [
        f"#SBATCH --{option}" + ("" if value is None else f"={shlex.quote(str(value))}")
        for option, value in given.items()
    ]
    if "exclusive" not in passed_on:
        directives.append("#SBATCH --exclusive")
    # --requeue: after Slurm takes a node away, the job is queued again and resumes from its last checkpoint.
    directives += ["#SBATCH --requeue", f"#SBATCH --signal=TERM@{SIGNAL_BEFORE_END_S}"]
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


def _option(text: str) -> tuple[str, str | None]:
    """qos=high or --qos=high → (qos, high); exclusive → (exclusive, None)."""
    found = OPTION.fullmatch(text)
    if found is None:
        raise UserError(f"--sbatch {text!r}: expected OPTION or OPTION=VALUE of sbatch, such as qos=high")
    option, value = found.groups()
    if option in OWN_OPTIONS:
        own = "output_dir" if option == "output" else f"--{OPTIONS.get(option, option)}"
        raise UserError(f"--sbatch {text!r}: expected {own} for this option")
    if option in OURS:
        raise UserError(f"--sbatch {text!r}: the script sets {option} itself: expected another option")
    return option, value
