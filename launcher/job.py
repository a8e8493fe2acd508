"""A training job as the user asked for it, and the checks that need no process group."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from mme.config import USER_ID, Config, flat, load_config, settings_sha256, validate_world_size
from mme.errors import UserError
from mme.files import read_json, read_text, sha256
from mme.paths import remote_url
from mme.records import parse_record

CPU_PROCESSES = 2  # default processes of a node without a GPU
NODES_MEET_WITHIN_S = 900  # nodes of a cluster can start minutes apart

Count = Annotated[int, Field(ge=0, lt=2**62)]


class _Sizes(TypedDict):
    """What dataset.json says of the rows of a model's tables."""

    __pydantic_config__ = ConfigDict(extra="ignore")  # type: ignore[misc]

    num_items: Count
    num_users: NotRequired[Count]
    features: NotRequired[dict[str, Count]]


@dataclass(frozen=True)
class Job:
    """A configuration on ``nnodes`` nodes of ``nproc_per_node`` processes each.

    An elastic job runs on at least ``min_nodes`` and at most ``nnodes``, on as many as have joined.
    """

    config: Path
    overrides: tuple[str, ...]
    nnodes: int
    nproc_per_node: int
    max_restarts: int
    rdzv_endpoint: str | None = None  # HOST:PORT of the rendezvous; None: one node, which meets in a local file
    rdzv_timeout_s: int = NODES_MEET_WITHIN_S  # how long nodes wait for each other, at first and after a restart
    min_nodes: int | None = None  # None: nnodes

    @property
    def fewest_nodes(self) -> int:
        return self.nnodes if self.min_nodes is None else self.min_nodes

    @property
    def is_elastic(self) -> bool:
        return self.fewest_nodes < self.nnodes

    @property
    def nodes(self) -> str:
        """As `--nnodes` takes them: N, or MIN:MAX."""
        return f"{self.min_nodes}:{self.nnodes}" if self.is_elastic else str(self.nnodes)

    @property
    def train_arguments(self) -> list[str]:
        """The arguments of ``python -m`` on each worker."""
        return ["mme", "train", "--config", str(self.config), *self.overrides]

    @property
    def rendezvous_id(self) -> str:
        """A hash of configuration, output folder and data set, equal on all nodes of a job.

        It keeps two jobs apart that are started at the same endpoint (`launcher.same_job` reports them).
        """
        return f"mme-{settings_sha256(self.settings)[:16]}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, by key, that must be equal on all nodes."""
        config = self.load()
        description = Path(config.data.path) / "dataset.json"
        data = None
        with suppress(OSError):  # `require_dataset` says what is wrong with it
            data = sha256(description, description.parent)
        return {**flat(config), "the SHA-256 of dataset.json in data.path": data, "--nnodes": self.nodes}

    def load(self) -> Config:
        """The configuration, checked against the number of processes, for each number of nodes that the job may have.

        Raises:
            UserError: the configuration is wrong or does not fit the number of processes.
        """
        config = load_config(self.config, list(self.overrides))
        for nodes in range(self.fewest_nodes, self.nnodes + 1):
            validate_world_size(config, nodes * self.nproc_per_node)
        return config


def require_dataset(config: Config) -> None:
    """Raises UserError unless ``data.path`` is a prepared training set; the workers check a remote one."""
    if remote_url(config.data.path) is not None:
        return
    folder = Path(config.data.path)
    description = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"data.path: {folder}: no such folder, expected one written by `mme prepare`")
    try:
        read_json(description, folder)
    except FileNotFoundError as error:
        raise UserError(f"data.path: {folder}: no dataset.json, expected a folder written by `mme prepare`") from error
    except OSError as error:
        raise UserError(f"{description}: {error.strerror}, expected a folder written by `mme prepare`") from error
    except ValueError as error:
        raise UserError(f"{description}: not JSON ({error}): run `mme prepare` again") from error


def items_of(config: Config) -> int:
    """Rows per table according to the data set: its items and the values of the features that the model reads.

    Raises:
        UserError: ``data.path`` holds no data set that gives these numbers.
    """
    if remote_url(config.data.path) is not None:
        raise UserError(f"data.path: {config.data.path}: a remote data set is not read here: give --items N")
    path, model = Path(config.data.path) / "dataset.json", config.model
    advice = "prepare the data set, or give --items N"
    try:
        info = parse_record(read_text(path, path.parent), _Sizes)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: num_items cannot be read: {advice}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}: {advice}") from error
    sizes = {**info.get("features", {}), USER_ID: info.get("num_users", 0)}
    names = (*model.event_features, *model.user_features)
    if missing := next((name for name in names if name not in sizes), None):
        raise UserError(f"{path}: has no {missing}: prepare the data set with it, or give --items N")
    # Each feature has one more row, for a missing value.
    return info["num_items"] + sum(sizes[name] + 1 for name in names)


def parse_nodes(text: str) -> tuple[int, int]:
    """``4`` → (4, 4); ``2:8`` → (2, 8), the fewest and the most nodes.

    Raises:
        UserError: ``text`` has neither form.
    """
    fewest, _, most = text.partition(":")
    most = most if ":" in text else fewest
    if not all(number.isascii() and number.isdecimal() and 0 < int(number) < 2**31 for number in (fewest, most)):
        raise UserError(f"--nnodes {text!r}: expected a number of nodes, or MIN:MAX, such as 4 or 2:8")
    if int(fewest) > int(most):
        raise UserError(f"--nnodes {text}: MIN ({fewest}) must not exceed MAX ({most})")
    return int(fewest), int(most)


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``host:port`` → (host, port).

    Raises:
        UserError: ``endpoint`` does not have that form.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def default_processes() -> int:
    """One process per GPU of this node, or 2 on a node without GPUs."""
    return len(gpus()) or CPU_PROCESSES


def gpus() -> list[str]:
    """The GPUs of this node that CUDA_VISIBLE_DEVICES leaves visible, one line of `nvidia-smi -L` each."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in answer if line.startswith("GPU ")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    chosen = [device for device in visible.split(",") if device.strip() and device.strip() != "-1"]
    return found[: len(chosen)]
