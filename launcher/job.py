"""One training job, whoever starts it: what is asked for, and the checks that need no process group."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mme.config import USER_ID, Config, flat, load_config, settings_sha256, validate_world_size
from mme.errors import UserError
from mme.files import read_json

CPU_PROCESSES = 2  # processes of a node without a GPU, unless asked otherwise
NODES_MEET_WITHIN_S = 900  # nodes of a cluster start minutes apart


@dataclass(frozen=True)
class Job:
    """A configuration on ``nnodes`` nodes of ``nproc_per_node`` processes each."""

    config: Path
    overrides: tuple[str, ...]
    nnodes: int
    nproc_per_node: int
    max_restarts: int
    rdzv_endpoint: str | None = None  # HOST:PORT where the nodes meet; None: this node alone, on a free port
    rdzv_timeout_s: int = NODES_MEET_WITHIN_S  # how long nodes wait for each other, at first and after a restart

    @property
    def train_arguments(self) -> list[str]:
        """What follows ``python -m`` on each worker."""
        return ["mme", "train", "--config", str(self.config), *self.overrides]

    @property
    def rendezvous_id(self) -> str:
        """The same on all nodes of this job and on no other's: a hash of configuration, output folder and data set.

        Two jobs that are started at one endpoint don't mix.
        """
        config = self.load()
        description = Path(config.data.path) / "dataset.json"
        data = hashlib.sha256(description.read_bytes()).hexdigest() if description.is_file() else None
        return f"mme-{settings_sha256({**flat(config), 'dataset.json': data})[:16]}"

    def load(self) -> Config:
        """The configuration, found to fit the number of processes.

        Raises:
            UserError: it does not, or is wrong in itself.
        """
        config = load_config(self.config, list(self.overrides))
        validate_world_size(config, self.nnodes * self.nproc_per_node)
        return config


def require_dataset(config: Config) -> None:
    """Raises UserError unless ``data.path`` is a prepared training set."""
    folder = Path(config.data.path)
    description = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"data.path: {folder}: no such folder, expected one written by `mme prepare`")
    try:
        read_json(description, folder)
    except FileNotFoundError as error:
        raise UserError(f"data.path: {folder}: no dataset.json in it, expected a folder of `mme prepare`") from error
    except OSError as error:
        raise UserError(f"{description}: {error.strerror}: expected a folder of `mme prepare`") from error
    except ValueError as error:
        raise UserError(f"{description}: not JSON ({error}): run `mme prepare` again") from error


def items_of(config: Config) -> int:
    """The rows of each table, as the data set says: its items, and the values of the features that the model reads.

    Raises:
        UserError: there is no data set that does.
    """
    path, model = Path(config.data.path) / "dataset.json", config.model
    try:
        info = read_json(path, path.parent)
        sizes = {**info.get("features", {}), USER_ID: info["num_users"]} if model.feature_columns else {}
        # Beside its values each feature has a row for one that is missing.
        return int(info["num_items"]) + sum(sizes[name] + 1 for name in (*model.event_features, *model.user_features))
    except KeyError as error:
        raise UserError(
            f"{path}: {error.args[0]} is not in it: prepare the data set with it, or give --items N"
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no num_items to be read there: prepare the data set, or give --items N") from error


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``host:port`` → (host, port).

    Raises:
        UserError: it is not of that form.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def default_processes() -> int:
    """One process a GPU of this node, or 2 where there is none."""
    return len(gpus()) or CPU_PROCESSES


def gpus() -> list[str]:
    """The GPUs of this node that a process sees, one line each, as the NVIDIA driver names them."""
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
