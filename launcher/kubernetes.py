"""The Kubernetes manifest of a job.

It has a JobSet with one Indexed Job of one pod per node, a NetworkPolicy that admits only the job's own pods, and a
ConfigMap with the configuration. If a pod fails, the JobSet controller deletes all pods and starts the set again. The
rendezvous is on pod 0, whose name NAME-nodes-0-0.NAME the controller's headless Service resolves for all pods.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from launcher.job import Job
from launcher.pod_options import PodOptions, literal
from launcher.torchrun import STOPS_WITHIN_S
from mme.errors import UserError, first_line
from mme.files import read_text
from mme.run.exit_status import PREEMPTED, USER_ERROR
from mme.shipped import own_or_shipped

PORT = 29500
WORKDIR, IMAGE_USER = "/opt/mme", 10001  # as in the Dockerfile
CONFIG_FOLDER = "/etc/mme"
NODES = "nodes"  # the JobSet's name for its only Job
JOB_SET = "jobset.sigs.k8s.io/jobset-name"  # the controller's label of the pods
DNS_LABEL = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")  # leaves room for -nodes-0-NUMBER in the 63 of a pod's name


def manifest(job: Job, *, name: str, image: str, namespace: str | None, claim: str, options: PodOptions) -> str:
    """The manifest as YAML: ConfigMap, NetworkPolicy and JobSet.

    Raises:
        UserError: ``name`` is not a DNS label, or the configuration cannot be read.
    """
    if not DNS_LABEL.fullmatch(name):
        raise UserError(f"--name {name!r}: expected a letter, then at most 49 of a-z, 0-9 and -, with no - at the end")
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
            # Ranks do not authenticate connections to their ports.
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata,
            "spec": {
                "podSelector": {"matchLabels": {JOB_SET: name}},
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": {"matchLabels": {JOB_SET: name}}}]}],
            },
        },
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                # The pods need each other's names before any of them is ready.
                "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
                "failurePolicy": {
                    "maxRestarts": job.max_restarts,
                    # No pod of the failed attempt may still answer at the rendezvous.
                    "restartStrategy": "BlockingRecreate",
                    "rules": [
                        {"name": "input", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                    ],
                },
                "replicatedJobs": [
                    {"name": NODES, "replicas": 1, "template": {"spec": _job(job, name, image, claim, options)}}
                ],
            },
        },
    ]
    return "---\n".join(yaml.dump(document, sort_keys=False, Dumper=_Dumper) for document in documents)


def _job(job: Job, name: str, image: str, claim: str, options: PodOptions) -> dict[str, Any]:
    return {
        "completionMode": "Indexed",
        "completions": job.nnodes,
        "parallelism": job.nnodes,
        "backoffLimit": 0,  # a failed pod fails the Job, so that the whole set restarts
        # A wrong configuration fails the JobSet immediately, because restarts cannot help. A pod that was asked to stop has
        # saved a checkpoint and is replaced alone, without counting as a failure.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": action,
                    "onExitCodes": {"containerName": "mme", "operator": "In", "values": [status]},
                }
                for action, status in (("Ignore", PREEMPTED), ("FailJob", USER_ERROR))
            ]
        },
        "template": {"metadata": {"labels": {"app": name}}, "spec": _pod(job, name, image, claim, options)},
    }


def _pod(job: Job, name: str, image: str, claim: str, options: PodOptions) -> dict[str, Any]:
    command = ["python", "-m", "launcher", "run", "--config", f"{CONFIG_FOLDER}/config.yaml"]
    command += ["--nnodes", str(job.nnodes), "--nproc-per-node", str(job.nproc_per_node)]
    command += [
        "--rdzv-endpoint",
        f"{name}-{NODES}-0-0.{name}:{PORT}",
        "--max-restarts",
        str(job.max_restarts),
        *job.overrides,
    ]
    container: dict[str, Any] = {
        "name": "mme",
        "image": image,
        "workingDir": WORKDIR,
        "command": [literal(word) for word in command],
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG_FOLDER},
            # NCCL and the workers of one node exchange data through shared memory.
            {"name": "shared-memory", "mountPath": "/dev/shm"},
            {"name": "shared", "mountPath": f"{WORKDIR}/datasets", "subPath": "datasets"},
            {"name": "shared", "mountPath": f"{WORKDIR}/runs", "subPath": "runs"},
        ],
    }
    container |= options.of_container()
    return options.of_pod() | {
        # fsGroup lets the image's user write to the shared volume.
        "securityContext": {"runAsNonRoot": True, "runAsUser": IMAGE_USER, "fsGroup": IMAGE_USER},
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOPS_WITHIN_S + 30,
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": name}},
            {"name": "shared-memory", "emptyDir": options.shared_memory_volume()},
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
