"""What a user may ask for the pods of a job on Kubernetes: resources, network devices, nodes and environment."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mme.errors import UserError

QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")  # of Kubernetes, such as 500m, 2, 64Gi
KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
EFFECTS = ("NoSchedule", "PreferNoSchedule", "NoExecute")


@dataclass(frozen=True)
class PodOptions:
    """Parts of a pod's specification.

    Attributes:
        requests: resources that the pod's node must have free: cpu, memory.
        limits: devices, by resource name.
        shared_memory: limit of /dev/shm; None: half of the node's memory, Kubernetes' default.
        locks_memory: whether the pod may lock memory, which RDMA needs.
    """

    requests: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    shared_memory: str | None = None
    locks_memory: bool = False
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, str]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(
        cls,
        *,
        gpus: int,
        cpu: str | None,
        memory: str | None,
        shared_memory: str | None,
        rdma: Sequence[str],
        node_selector: Sequence[str],
        tolerations: Sequence[str],
        environment: Sequence[str],
    ) -> PodOptions:
        """From the values of the command line.

        Raises:
            UserError: a value does not have the form that its option expects.
        """
        quantities = {"cpu": cpu, "memory": memory, "shared-memory": shared_memory}
        for option, value in quantities.items():
            if value is not None and not QUANTITY.fullmatch(value):
                raise UserError(f"--{option} {value!r}: expected a quantity of Kubernetes, such as 16, 500m or 64Gi")
        devices = dict(_device(text) for text in rdma)
        return cls(
            requests={name: value for name, value in (("cpu", cpu), ("memory", memory)) if value is not None},
            limits=({"nvidia.com/gpu": gpus} if gpus else {}) | devices,
            shared_memory=shared_memory,
            locks_memory=bool(devices),
            node_selector=dict(_label(text) for text in node_selector),
            tolerations=[_toleration(text) for text in tolerations],
            environment=dict(_variable(text) for text in environment),
        )

    def of_container(self) -> dict[str, Any]:
        """Keys of the container's specification."""
        resources = {"requests": self.requests, "limits": self.limits}
        security: dict[str, Any] = {"allowPrivilegeEscalation": False}
        if self.locks_memory:
            security["capabilities"] = {"add": ["IPC_LOCK"]}
        found: dict[str, Any] = {"securityContext": security}
        if given := {kind: values for kind, values in resources.items() if values}:
            found["resources"] = given
        if self.environment:
            found["env"] = [{"name": name, "value": literal(value)} for name, value in self.environment.items()]
        return found

    def of_pod(self) -> dict[str, Any]:
        """Keys of the pod's specification."""
        found = {"nodeSelector": self.node_selector, "tolerations": self.tolerations}
        return {key: value for key, value in found.items() if value}

    def shared_memory_volume(self) -> dict[str, str]:
        return {"medium": "Memory"} | ({"sizeLimit": self.shared_memory} if self.shared_memory else {})


def literal(text: str) -> str:
    """``text`` without what Kubernetes would expand: $(NAME)."""
    return text.replace("$(", "$$(")


def _device(text: str) -> tuple[str, int]:
    """rdma/hca=2 → (rdma/hca, 2); without a number, 1."""
    name, _, number = text.partition("=")
    count = number or "1"
    if not KEY.fullmatch(name) or "/" not in name or not (count.isascii() and count.isdecimal() and int(count)):
        raise UserError(f"--rdma {text!r}: expected RESOURCE[=COUNT], such as rdma/hca_shared_devices=1")
    return name, int(count)


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
        raise UserError(f"--node-selector {text!r}: expected LABEL=VALUE, such as gpu=h100")
    return key, value


def _toleration(text: str) -> dict[str, str]:
    """As kubectl writes a taint: KEY[=VALUE][:EFFECT]."""
    taint, _, effect = text.partition(":")
    key, separator, value = taint.partition("=")
    if not KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(value) or (":" in text and effect not in EFFECTS):
        raise UserError(
            f"--toleration {text!r}: expected KEY[=VALUE][:EFFECT] with an effect of {', '.join(EFFECTS)}, such as "
            "nvidia.com/gpu:NoSchedule"
        )
    matched = {"operator": "Equal", "value": value} if separator else {"operator": "Exists"}
    return {"key": key, **matched} | ({"effect": effect} if effect else {})


def _variable(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not VARIABLE.fullmatch(name):
        raise UserError(f"--env {text!r}: expected NAME=VALUE, or the NAME of a variable of this environment")
    if not separator and name not in os.environ:
        raise UserError(f"--env {name}: not set in this environment: expected {name}=VALUE, or a variable that is set")
    return name, value if separator else os.environ[name]
