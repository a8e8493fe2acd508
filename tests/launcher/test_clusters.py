"""The sbatch script and the Kubernetes manifest have the right text, are written to files and are submitted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launcher.command_line import CONFIG, REPOSITORY, launch, the_error


def test_sbatch_script_is_bash_and_starts_the_launcher_once_per_node(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    arguments = ["--nnodes", "4", "--nproc-per-node", "8", "--partition", "gpu", "--output", path]
    done = launch("slurm", "--config", CONFIG, *arguments, "train.epochs=3", "data.path=a b")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {path}; submit it with: sbatch {path}\n"
    subprocess.run(["bash", "-n", path], check=True)
    # With stand-ins for Slurm's commands, the script calls the launcher with the right arguments.
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    for command in ("scontrol", "srun"):
        (tmp_path / command).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "12003"}
    environment = {**os.environ, **slurm, "SLURM_JOB_NUM_NODES": "4", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run(["bash", path], env=environment, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert words[words.index("--rdzv-endpoint") + 1] == "node7:20003"
    assert words[words.index("--nnodes") + 1] == "4"
    assert words[words.index("-m") : words.index("-m") + 3] == ["-m", "launcher", "run"]
    assert words[-3:] == ["train.epochs=3", "data.path=a b", ""]
    # Only the status of a preempted job requeues it.
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho scontrol $@\n")
    for status, requeued in [(143, True), (1, False)]:
        (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {status}\n")
        ended = subprocess.run(["bash", path], env=environment, capture_output=True, text=True)
        assert ended.returncode == status
        assert (ended.stdout == "scontrol requeue 12003\n") is requeued
    directives = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    for directive in ("--nodes=4", "--gpus-per-node=8", "--partition=gpu", "--requeue", "--signal=TERM@120"):
        assert f"#SBATCH {directive}" in directives


def test_dry_runs_print_what_would_be_written_and_write_nothing(tmp_path: Path) -> None:
    for command, first in [("slurm", "#!/bin/bash"), ("kubernetes", "apiVersion: v1")]:
        path = tmp_path / command
        arguments = ["--config", CONFIG, "--nnodes", "2", "--output", path]
        shown = launch(command, *arguments, "--dry-run")
        assert shown.stdout.splitlines()[0] == first
        assert not path.exists()
        assert launch(command, *arguments).returncode == 0
        assert path.read_text() == shown.stdout


def test_manifest_describes_an_indexed_job_whose_pods_find_each_other(tmp_path: Path) -> None:
    arguments = ["--nnodes", "3", "--nproc-per-node", "4", "--name", "fuxi", "--image", "mme:7", "--claim", "shared"]
    done = launch("kubernetes", "--config", CONFIG, *arguments, "train.epochs=3", "--dry-run")
    configuration, service, _, job = yaml.safe_load_all(done.stdout)
    assert configuration["data"]["config.yaml"] == (REPOSITORY / CONFIG).read_text()
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 3, 3)
    pod = job["spec"]["template"]["spec"]
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
    command = container["command"]
    assert command[command.index("--rdzv-endpoint") + 1] == "fuxi-0.fuxi:29500"
    assert command[command.index("--nnodes") + 1] == "3"
    assert command[-1] == "train.epochs=3"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert f"WORKDIR {container['workingDir']}\n" in dockerfile
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in dockerfile and "\nUSER mme\n" in dockerfile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a\ntouch pwned"], r"--name: 'a\ntouch pwned' contains a control character, which a #SBATCH line"),
        (["--partition", "p\r"], r"--partition: 'p\r' contains a control character"),
        (["--account", "a\x1b[2J"], r"--account: 'a\x1b[2J' contains a control character"),
        (["--time", "1\n"], r"--time: '1\n' contains a control character"),
        (['output_dir="runs/x\\ntouch pwned"'], r"output_dir: 'runs/x\ntouch pwned': expected a path without control"),
    ],
)
def test_a_control_character_in_a_directive_is_rejected(arguments: list[str], message: str) -> None:
    found = the_error(launch("slurm", "--config", CONFIG, *arguments, "--dry-run"))
    assert found.startswith(message)


def test_user_input_is_neither_executed_nor_expanded(tmp_path: Path) -> None:
    hostile = "data.path=$(touch pwned); `touch pwned` ' \" \n#"
    done = launch("slurm", "--config", CONFIG, "--name", "a b; touch pwned", "--output", tmp_path / "job", hostile)
    assert done.returncode == 0, done.stderr
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho node\n")
    (tmp_path / "srun").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    for command in ("scontrol", "srun"):
        (tmp_path / command).chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "1"}
    environment = {**os.environ, **slurm, "SLURM_JOB_NUM_NODES": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", tmp_path / "job"], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split("\0")[-2] == hostile
    assert not (tmp_path / "pwned").exists()
    done = launch("kubernetes", "--config", CONFIG, "--image", "a: b\n- c", hostile, "--dry-run")
    *_, job = yaml.safe_load_all(done.stdout)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "a: b\n- c"
    assert container["command"][-1] == hostile.replace("$(", "$$(")  # Kubernetes' escape for a literal `$(`
    assert the_error(launch("kubernetes", "--config", CONFIG, "--name", "A b", "--dry-run")).startswith("--name 'A b':")


def test_only_the_jobs_own_pods_reach_its_ports() -> None:
    done = launch("kubernetes", "--config", CONFIG, "--name", "fuxi", "--dry-run")
    policy = next(each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "NetworkPolicy")
    pods = {"matchLabels": {"job-name": "fuxi"}}
    assert policy["spec"] == {
        "podSelector": pods,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": pods}]}],
    }


def test_submission_without_sbatch_is_rejected_and_names_the_written_file(tmp_path: Path) -> None:
    path = tmp_path / "job.sbatch"
    message = the_error(launch("slurm", "--config", CONFIG, "--output", path, "--submit", PATH=str(tmp_path)))
    assert message == f"--submit: sbatch is not installed on this machine; wrote the job to {path}"
    assert path.is_file()
