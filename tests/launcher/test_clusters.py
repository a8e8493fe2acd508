"""The sbatch script and the Kubernetes manifest have the right text, are written to files and are submitted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

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


def manifest(*arguments: str, **environment: str) -> list[dict[str, Any]]:
    done = launch("kubernetes", "--config", CONFIG, *arguments, "--dry-run", **environment)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """The specification of the Job in the JobSet, which is the last document."""
    (replicated,) = documents[-1]["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return job_of(documents)["template"]["spec"]


def test_manifest_describes_a_job_set_whose_pods_find_each_other() -> None:
    arguments = ["--nnodes", "3", "--nproc-per-node", "4", "--name", "fuxi", "--image", "mme:7", "--claim", "shared"]
    documents = manifest(*arguments, "train.epochs=3")
    configuration, _, job_set = documents
    assert configuration["data"]["config.yaml"] == (REPOSITORY / CONFIG).read_text()
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod = job_of(documents), pod_of(documents)
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", 3, 3)
    network = job_set["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "subdomain": "fuxi", "publishNotReadyAddresses": True}
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 4}}
    command = container["command"]
    # JOBSET-JOB-JOB_INDEX-POD_INDEX.SUBDOMAIN
    first = f"fuxi-{job_set['spec']['replicatedJobs'][0]['name']}-0-0.fuxi:29500"
    assert command[command.index("--rdzv-endpoint") + 1] == first
    assert command[command.index("--nnodes") + 1] == "3"
    assert command[-1] == "train.epochs=3"
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert f"WORKDIR {container['workingDir']}\n" in dockerfile
    assert f"useradd --uid {pod['securityContext']['runAsUser']} " in dockerfile and "\nUSER mme\n" in dockerfile


def test_a_failed_pod_restarts_the_whole_set_but_neither_preemption_nor_a_mistake_does() -> None:
    documents = manifest("--max-restarts", "5")
    policy, job = documents[-1]["spec"]["failurePolicy"], job_of(documents)
    assert (policy["maxRestarts"], policy["restartStrategy"]) == (5, "BlockingRecreate")
    assert job["backoffLimit"] == 0  # the first failed pod fails the Job, and so the set
    actions = {rule["onExitCodes"]["values"][0]: rule["action"] for rule in job["podFailurePolicy"]["rules"]}
    assert actions == {143: "Ignore", 2: "FailJob"}
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_pods_get_resources_devices_nodes_and_variables() -> None:
    resources = [
        "--cpu",
        "96",
        "--memory",
        "800Gi",
        "--shared-memory",
        "64Gi",
        "--rdma",
        "rdma/hca=8",
        "--rdma",
        "rdma/b",
    ]
    nodes = ["--node-selector", "gpu=h100", "--node-selector", "topology.kubernetes.io/zone=a"]
    tolerations = ["--toleration", "nvidia.com/gpu:NoSchedule", "--toleration", "team=recsys:NoExecute"]
    variables = ["--env", "NCCL_DEBUG=INFO", "--env", "MINE", "--env", "A=$(B)=c"]
    pod = pod_of(manifest(*resources, *nodes, *tolerations, *variables, MINE="of this shell"))
    (container,) = pod["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "96", "memory": "800Gi"},
        "limits": {"nvidia.com/gpu": 8, "rdma/hca": 8, "rdma/b": 1},
    }
    assert container["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"]}
    (memory,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory")
    assert memory == {"medium": "Memory", "sizeLimit": "64Gi"}
    assert pod["nodeSelector"] == {"gpu": "h100", "topology.kubernetes.io/zone": "a"}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "recsys", "effect": "NoExecute"},
    ]
    found = {variable["name"]: variable["value"] for variable in container["env"]}
    assert found == {"NCCL_DEBUG": "INFO", "MINE": "of this shell", "A": "$$(B)=c"}


def test_pods_ask_for_nothing_that_was_not_given() -> None:
    pod = pod_of(manifest("--gpus-per-node", "0"))
    (container,) = pod["containers"]
    assert not {"resources", "env"} & set(container) and not {"nodeSelector", "tolerations"} & set(pod)
    assert container["securityContext"] == {"allowPrivilegeEscalation": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "--memory 'lots': expected a quantity of Kubernetes, such as 16, 500m or 64Gi"),
        (["--shared-memory", "8 GB"], "--shared-memory '8 GB': expected a quantity"),
        (["--rdma", "hca=1"], "--rdma 'hca=1': expected RESOURCE[=COUNT]"),
        (["--rdma", "rdma/hca=0"], "--rdma 'rdma/hca=0': expected RESOURCE[=COUNT]"),
        (["--node-selector", "gpu"], "--node-selector 'gpu': expected LABEL=VALUE"),
        (
            ["--toleration", "gpu:Never"],
            "--toleration 'gpu:Never': expected KEY[=VALUE][:EFFECT] with an effect of NoSch",
        ),
        (["--env", "MME_UNSET"], "--env MME_UNSET: not set in this environment: expected MME_UNSET=VALUE"),
        (["--env", "1=2"], "--env '1=2': expected NAME=VALUE"),
        (["--name", "1fuxi"], "--name '1fuxi': expected a letter"),
    ],
)
def test_a_malformed_option_of_pods_is_rejected(arguments: list[str], message: str) -> None:
    assert the_error(launch("kubernetes", "--config", CONFIG, *arguments, "--dry-run")).startswith(message)


def test_any_further_option_reaches_sbatch(tmp_path: Path) -> None:
    path = tmp_path / "job"
    further = [
        "--sbatch",
        "qos=high",
        "--sbatch",
        "--constraint=h100&ib",
        "--sbatch",
        "contiguous",
        "--sbatch",
        "exclusive=user",
    ]
    done = launch("slurm", "--config", CONFIG, "--output", path, *further)
    assert done.returncode == 0, done.stderr
    directives = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    for directive in ("--qos=high", "--constraint='h100&ib'", "--contiguous", "--exclusive=user"):
        assert f"#SBATCH {directive}" in directives
    assert "#SBATCH --exclusive" not in directives


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-q high", "--sbatch '-q high': expected OPTION or OPTION=VALUE of sbatch, such as qos=high"),
        ("nodes=4", "--sbatch 'nodes=4': expected --nnodes for this option"),
        ("output=x", "--sbatch 'output=x': expected output_dir for this option"),
        ("array=1-4", "--sbatch 'array=1-4': the script sets array itself: expected another option"),
        ("qos=a\ntouch pwned", r"--sbatch qos: 'a\ntouch pwned' contains a control character, which a #SBATCH line"),
    ],
)
def test_an_option_that_sbatch_cannot_take_is_rejected(option: str, message: str) -> None:
    assert the_error(launch("slurm", "--config", CONFIG, "--sbatch", option, "--dry-run")).startswith(message)


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
    (container,) = pod_of(manifest("--image", "a: b\n- c", hostile))["containers"]
    assert container["image"] == "a: b\n- c"
    assert container["command"][-1] == hostile.replace("$(", "$$(")  # Kubernetes' escape for a literal `$(`
    assert the_error(launch("kubernetes", "--config", CONFIG, "--name", "A b", "--dry-run")).startswith("--name 'A b':")


def test_only_the_jobs_own_pods_reach_its_ports() -> None:
    policy = next(each for each in manifest("--name", "fuxi") if each["kind"] == "NetworkPolicy")
    pods = {"matchLabels": {"jobset.sigs.k8s.io/jobset-name": "fuxi"}}
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
