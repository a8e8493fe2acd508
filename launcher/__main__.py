"""``python -m launcher`` (console script ``mme-launch``) starts a training job on one node, several nodes or a cluster.

Exit status: 0 on success; 1 if the job or a preflight check failed; 2 if the input or the configuration is wrong;
128 + n after signal n.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from launcher import kubernetes as kubernetes_job
from launcher import rendezvous, torchrun
from launcher import slurm as slurm_job
from launcher.job import NODES_MEET_WITHIN_S, Job, default_processes, parse_nodes, require_dataset
from launcher.pod_options import PodOptions
from mme.errors import UserError, print_line
from mme.files import write_text
from mme.run.exit_status import USER_ERROR

# typer reads these annotations at run time; on Python 3.10 it needs Optional[X] for a value that may be missing.
# ruff: noqa: UP045

app = typer.Typer(name="launcher", add_completion=False, no_args_is_help=True, rich_markup_mode="markdown")

Config = Annotated[
    Path, typer.Option("--config", metavar="FILE", help="YAML configuration; docs/configuration.md lists every key.")
]
Overrides = Annotated[
    Optional[list[str]],
    typer.Argument(metavar="KEY.PATH=VALUE", help="Override values of the file, such as train.lr=0.002."),
]
Nodes = Annotated[int, typer.Option("--nnodes", min=1, help="Number of nodes.")]
ElasticNodes = Annotated[
    str, typer.Option("--nnodes", metavar="N|MIN:MAX", help="Number of nodes, or the fewest and the most.")
]
Processes = Annotated[
    Optional[int],
    typer.Option("--nproc-per-node", min=1, help="Processes per node. Default: one per GPU, or 2 without GPUs."),
]
ClusterProcesses = Annotated[
    int, typer.Option("--nproc-per-node", min=1, help="Processes per node, one per GPU (see --gpus-per-node).")
]
ClusterGpus = Annotated[
    Optional[int],
    typer.Option(min=0, help="GPUs to request per node. Default: one per process; 0 for a cluster without GPUs."),
]
Endpoint = Annotated[
    Optional[str],
    typer.Option(metavar="HOST:PORT", help="Rendezvous: a free port on one of the nodes. Give all nodes the same."),
]
EndpointTimeout = Annotated[
    int,
    typer.Option("--rdzv-timeout", min=1, help="Seconds that nodes wait for each other, at first and after a restart."),
]
Restarts = Annotated[
    int, typer.Option(min=0, help="How often the workers restart from the last checkpoint after one of them died.")
]
Items = Annotated[
    Optional[int], typer.Option(min=1, help="Number of items in the catalogue. Default: read data.path/dataset.json.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print exactly what would be run or written, then exit.")]
Submit = Annotated[bool, typer.Option("--submit", help="Submit the job after writing the file.")]
Output = Annotated[
    Optional[Path], typer.Option(metavar="FILE", help="File to write. Default: a file next to the run's folder.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: the process's own) and returns the exit status."""
    try:
        status = typer.main.get_command(app).main(
            args=None if arguments is None else list(arguments), prog_name="mme-launch", standalone_mode=False
        )
    except typer.TyperException as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        if message:  # empty when the command line has no arguments: typer has printed the help already
            _print_error(f"{message} (see `mme-launch --help`)")
        return error.exit_code
    except typer.Abort:
        return 1
    return status if isinstance(status, int) else 0


@app.callback()
def launcher() -> None:
    """Start a training job on this node, on several nodes, through Slurm or on Kubernetes.

    Every command accepts `--dry-run`, which prints exactly what the command would do.

        mme-launch run --config configs/quickstart.yaml

        mme-launch preflight

        mme-launch plan --config configs/quickstart.yaml --nnodes 2 --gpu h100-80g
    """


@app.command(no_args_is_help=True)
def run(
    config: Config,
    overrides: Overrides = None,
    nnodes: ElasticNodes = "1",
    nproc_per_node: Processes = None,
    rdzv_endpoint: Endpoint = None,
    rdzv_timeout: EndpointTimeout = NODES_MEET_WITHIN_S,
    max_restarts: Restarts = 3,
    dry_run: DryRun = False,
) -> None:
    """Train on this node, as one of --nnodes, through torchrun.

    With --nnodes MIN:MAX the job runs on as many nodes as have joined. When one joins or leaves, all workers restart.

    When a worker dies, all workers restart and resume from the last complete checkpoint. A mistake in the input or the
    configuration ends the job immediately with status 2.

    Examples:

        mme-launch run --config configs/quickstart.yaml

        mme-launch run --config configs/quickstart.yaml --nnodes 2 --rdzv-endpoint node0:29500   (on both nodes)
    """
    with _user_errors():
        fewest, most = parse_nodes(nnodes)
        job = Job(
            config,
            tuple(overrides or ()),
            most,
            nproc_per_node or default_processes(),
            max_restarts,
            rdzv_endpoint,
            rdzv_timeout,
            fewest,
        )
        settings = job.load()
        if dry_run:
            rendezvous.require_endpoint_given(job)
            print(torchrun.command_line(job))
            return
        require_dataset(settings)
        rendezvous.require_endpoint(job)
        raise typer.Exit(torchrun.run(job, resumes=settings.train.resume, run_folder=Path(settings.output_dir)))


@app.command(no_args_is_help=True)
def slurm(
    config: Config,
    overrides: Overrides = None,
    nnodes: Nodes = 1,
    nproc_per_node: ClusterProcesses = 8,
    gpus_per_node: ClusterGpus = None,
    max_restarts: Restarts = 3,
    name: Annotated[str, typer.Option(help="Name of the job.")] = "mme",
    partition: Annotated[Optional[str], typer.Option(help="Partition to run in.")] = None,
    account: Annotated[Optional[str], typer.Option(help="Account to charge.")] = None,
    time_limit: Annotated[Optional[str], typer.Option("--time", help="Time limit, such as 12:00:00.")] = None,
    sbatch: Annotated[
        Optional[list[str]],
        typer.Option(metavar="OPTION[=VALUE]", help="Any further option of sbatch, such as qos=high; repeatable."),
    ] = None,
    output: Output = None,
    submit: Submit = False,
    dry_run: DryRun = False,
) -> None:
    """Write the sbatch script of a job; with --submit, also submit it to Slurm.

    The script starts `mme-launch run` once on each node, in the folder from which it is submitted. All nodes must share
    that folder, data.path and output_dir.

    Example:

        mme-launch slurm --config configs/ml-20m.yaml --nnodes 4 --nproc-per-node 8 --time 12:00:00 --submit
    """
    with _user_errors():
        job = Job(config, tuple(overrides or ()), nnodes, nproc_per_node, max_restarts)
        settings = job.load()
        path = output or Path(f"{settings.output_dir}.sbatch")
        script = slurm_job.script(
            job,
            name=name,
            gpus_per_node=nproc_per_node if gpus_per_node is None else gpus_per_node,
            log=f"{path.with_suffix('')}.slurm-%j.out",
            options={"partition": partition, "account": account, "time": time_limit},
            further=sbatch or (),
        )
        _write_and_submit(script, path, ["sbatch", str(path)], submit, dry_run)


@app.command(no_args_is_help=True)
def kubernetes(
    config: Config,
    overrides: Overrides = None,
    nnodes: Nodes = 1,
    nproc_per_node: ClusterProcesses = 8,
    gpus_per_node: ClusterGpus = None,
    max_restarts: Restarts = 3,
    name: Annotated[str, typer.Option(help="Name of the job, its service and its configuration.")] = "mme",
    image: Annotated[str, typer.Option(help="Image to run, built from this project's Dockerfile.")] = "mme:latest",
    namespace: Annotated[Optional[str], typer.Option(help="Namespace. Default: the current one.")] = None,
    claim: Annotated[
        str, typer.Option(help="PersistentVolumeClaim (ReadWriteMany) that holds the folders datasets and runs.")
    ] = "mme",
    cpu: Annotated[Optional[str], typer.Option(help="CPUs that each pod requests, such as 96.")] = None,
    memory: Annotated[Optional[str], typer.Option(help="Memory that each pod requests, such as 800Gi.")] = None,
    shared_memory: Annotated[Optional[str], typer.Option(help="Limit of /dev/shm, such as 64Gi.")] = None,
    rdma: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="RESOURCE[=COUNT]", help="RDMA devices of each pod, which may then lock memory; repeatable."
        ),
    ] = None,
    node_selector: Annotated[
        Optional[list[str]], typer.Option(metavar="LABEL=VALUE", help="Nodes to run on; repeatable.")
    ] = None,
    toleration: Annotated[
        Optional[list[str]], typer.Option(metavar="KEY[=VALUE][:EFFECT]", help="Taint of nodes to accept; repeatable.")
    ] = None,
    env: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME[=VALUE]", help="Variable of the pods, by default with its value here; repeatable."),
    ] = None,
    output: Output = None,
    submit: Submit = False,
    dry_run: DryRun = False,
) -> None:
    """Write the manifest of a job (a JobSet); with --submit, also apply it with kubectl.

    Relative values of data.path and output_dir start at the image's working folder, where the claim's folders datasets
    and runs are mounted.

    Example:

        mme-launch kubernetes --config configs/ml-20m.yaml --nnodes 4 --image mme:1 --submit
    """
    with _user_errors():
        job = Job(config, tuple(overrides or ()), nnodes, nproc_per_node, max_restarts)
        settings = job.load()
        manifest = kubernetes_job.manifest(
            job,
            name=name,
            image=image,
            namespace=namespace,
            claim=claim,
            options=PodOptions.parse(
                gpus=nproc_per_node if gpus_per_node is None else gpus_per_node,
                cpu=cpu,
                memory=memory,
                shared_memory=shared_memory,
                rdma=rdma or (),
                node_selector=node_selector or (),
                tolerations=toleration or (),
                environment=env or (),
            ),
        )
        path = output or Path(f"{settings.output_dir}.kubernetes.yaml")
        _write_and_submit(manifest, path, ["kubectl", "apply", "-f", str(path)], submit, dry_run)


@app.command()
def preflight(
    overrides: Overrides = None,
    nnodes: Nodes = 1,
    nproc_per_node: Processes = None,
    rdzv_endpoint: Endpoint = None,
    output_dir: Annotated[
        Optional[Path],
        typer.Option(
            metavar="DIR",
            help="Folder for runs; several nodes need a shared one. Default: output_dir of --config, or runs.",
        ),
    ] = None,
    config: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Configuration of a job: check that its memory and checkpoints fit."),
    ] = None,
    items: Items = None,
    dry_run: DryRun = False,
) -> None:
    """Check this node and, when started on all nodes, the group.

    The checks of a node cover package versions, loading of the libraries, GPUs, memory, disk, the checkpoint folder and
    a matrix product compared with float64. The checks of the group cover links, all-reduce, all-to-all, clocks and the
    shared folder. Each warning or failure says what to do. The exit status is 1 if a check failed.

    Examples:

        mme-launch preflight

        mme-launch preflight --config configs/ml-20m.yaml

        mme-launch preflight --nnodes 2 --rdzv-endpoint node0:29500 --output-dir /shared/runs   (on both nodes)
    """
    with _user_errors():
        from launcher.preflight import commands, needs_of
        from launcher.preflight import preflight as check

        processes = nproc_per_node or default_processes()
        job = Job(config or Path(), tuple(overrides or ()), nnodes, processes, 0, rdzv_endpoint)
        if overrides and config is None:
            raise UserError(f"{overrides[0]}: overrides need a configuration, expected --config FILE")
        folder = output_dir or (Path(job.load().output_dir) if config is not None else Path("runs"))
        if dry_run:
            rendezvous.require_endpoint_given(job)
            print("\n".join(shlex.join(line) for line in commands(job, folder)))
            return
        rendezvous.require_endpoint(job)
        raise typer.Exit(check(job, folder, needs_of(job, items) if config is not None else None))


@app.command(no_args_is_help=True)
def plan(
    config: Config,
    overrides: Overrides = None,
    nnodes: Nodes = 1,
    nproc_per_node: ClusterProcesses = 8,
    gpu: Annotated[
        str, typer.Option(help="a100-80g, h100-80g, h200, b200, l40s, or cpu for processes on a machine like this.")
    ] = "h100-80g",
    items: Items = None,
    host_memory: Annotated[
        Optional[float],
        typer.Option(help="GiB of memory of a node; default: of common servers with this GPU (cpu: of this machine)."),
    ] = None,
    as_configured: Annotated[
        bool, typer.Option("--as-configured", help="Keep the configured table sharding and expert-parallel size.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Changes nothing, because plan starts nothing.")] = False,
) -> None:
    """Choose table sharding and expert placement; predict memory per rank and time per step, by part.

    No GPU is needed. If no layout fits, the command says by how much and exits with status 2.

    Example:

        mme-launch plan --config configs/ml-20m.yaml --nnodes 2 --gpu a100-80g
    """
    with _user_errors():
        from launcher.plan import show_plan

        job = Job(config, tuple(overrides or ()), nnodes, nproc_per_node, 0)
        show_plan(job, gpu, items, host_memory, choose=not as_configured)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        _print_error(str(error))
        raise typer.Exit(USER_ERROR) from error
    except rendezvous.LaunchError as error:
        _print_error(str(error))
        raise typer.Exit(1) from error


def _write_and_submit(text: str, path: Path, submission: list[str], submit: bool, dry_run: bool) -> None:
    if dry_run:
        print(text, end="")
        if submit:
            print(f"# then: {shlex.join(submission)}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    if not submit:
        print_line(f"wrote {path}; submit it with: {shlex.join(submission)}", sys.stdout)
        return
    import subprocess

    try:
        raise typer.Exit(1 if subprocess.run(submission, check=False).returncode else 0)
    except FileNotFoundError as error:
        raise UserError(
            f"--submit: {submission[0]} is not installed on this machine; wrote the job to {path}"
        ) from error


def _print_error(text: str) -> None:
    print_line(f"error: {text}")


if __name__ == "__main__":
    sys.exit(main())
