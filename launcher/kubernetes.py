"""The Kubernetes manifest of a job.

It has an Indexed Job with one pod per node, a headless Service for the pods' names, a NetworkPolicy that admits only the
job's own pods, and a ConfigMap with the configuration. The rendezvous is on pod 0: an Indexed Job names its pods' hosts
NAME-0, NAME-1, …, and the headless Service resolves NAME-0.NAME for all of them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from launcher.job import Job
from launcher.torchrun import STOPS_WITHIN_S
from mme.errors import UserError, first_line
from mme.files import read_text
from mme.run.exit_status import PREEMPTED, USER_ERROR
from mme.shipped import own_or_shipped

PORT = 29500
WORKDIR, IMAGE_USER = "/opt/mme", 10001  # as in the Dockerfile
CONFIG_FOLDER = "/etc/mme"
DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?")  # leaves room for a pod's number


def manifest(job: Job, *, name: str, image: str, namespace: str | None, claim: str, gpus_per_node: int) -> str:
    """The manifest as YAML: ConfigMap, Service, NetworkPolicy and Job.

    Raises:
        UserError: ``name`` is not a DNS label, or the configuration cannot be read.
    """
    if not DNS_LABEL.fullmatch(name):
        raise UserError(f"--name {name!r}: expected at most 50 of a-z, 0-9 and -, with no - at either end")
    try:
        configuration = read_text(own_or_shipped(job.config))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{job.config}: {first_line(error)}: expected a configuration file") from error
    metadata = {"name": name, "labels": {"app": name}} | ({"namespace": namespace} if namespace else {})
    documents = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata,
            "data": {"config.yaml": configuration},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "clusterIP": "None",
                # The pods need each other's names before any of them is ready.
                "publishNotReadyAddresses": True,
                "selector": {"job-name": name},
                "ports": [{"name": "rendezvous", "port": PORT}],
            },
        },
        {
            # Ranks do not authenticate connections to their ports.
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {
                "podSelector": {"matchLabels": {"job-name": name}},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {"job-name": name}}}]}],
            },
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            "spec": {
                "completionMode": "Indexed",
                "completions": job.nnodes,
                "parallelism": job.nnodes,
                "backoffLimit": job.max_restarts * job.nnodes,
                # A wrong configuration fails the job immediately, because retries cannot help. A pod that was asked to
                # stop has saved a checkpoint and does not count as a failure.
                "podFailurePolicy": {
                    "rules": [
                        {
                            "action": "Ignore",
                            "onExitCodes": {"containerName": "mme", "operator": "In", "values": [PREEMPTED]},
                        },
                        {
                            "action": "FailJob",
                            "onExitCodes": {"containerName": "mme", "operator": "In", "values": [USER_ERROR]},
                        },
                    ]
                },
                "template": {
                    "metadata": {"labels": {"app": name}},
                    "spec": _pod(job, name, image, claim, gpus_per_node),
                },
            },
        },
    ]
    return "---\n".join(yaml.dump(document, sort_keys=False, Dumper=_Dumper) for document in documents)


def _pod(job: Job, name: str, image: str, claim: str, gpus_per_node: int) -> dict[str, Any]:
    command = ["python", "-m", "launcher", "run", "--config", f"{CONFIG_FOLDER}/config.yaml"]
    command += ["--nnodes", str(job.nnodes), "--nproc-per-node", str(job.nproc_per_node)]
    command += ["--rdzv-endpoint", f"{name}-0.{name}:{PORT}", "--max-restarts", str(job.max_restarts), *job.overrides]
    container: dict[str, Any] = {
        "name": "mme",
        "image": image,
        "workingDir": WORKDIR,
        "command": [word.replace("$(", "$$(") for word in command],  # Kubernetes would expand $(NAME)
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FOLDER},
            # NCCL and the workers of one node exchange data through shared memory.
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "shared", "mountPath": f"{WORKDIR}/datasets", "subPath": "datasets"},
            {"name": "shared", "mountPath": f"{WORKDIR}/runs", "subPath": "runs"},
        ],
    }
    container["securityContext"] = {"allowPrivilegeEscalation": False}
    if gpus_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": gpus_per_node}}
    return {
        "subdomain": name,
        # fsGroup lets the image's user write to the shared volume.
        "securityContext": {"runAsNonRoot": True, "runAsUser": IMAGE_USER, "fsGroup": IMAGE_USER},
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOPS_WITHIN_S + 30,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
        ],
    }


class _Dumper(yaml.SafeDumper):
    """Writes repeated mappings in full, without aliases, and multi-line texts as literal blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
