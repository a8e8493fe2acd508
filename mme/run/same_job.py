"""Checks that all ranks run the same job: one configuration, one data set, one output folder.

Ranks that were started with different values, or that write to different folders of the same name, would otherwise train a
mixture of two jobs unnoticed.
"""

from __future__ import annotations

import platform
import time
import uuid
from pathlib import Path

from mme.config import Config, differing_keys, flat, settings_sha256
from mme.distributed.world import World
from mme.errors import UserError
from mme.files import VISIBLE_WITHIN_S, read_text, write_text

TOKEN_FILE = ".shared"


def require_same_job(config: Config, dataset_sha256: str, world: World) -> None:
    """Compares configuration and data set of all ranks; a collective.

    Raises:
        UserError: on all ranks, if one differs from rank 0; the line names the rank and the first key that differs.
    """
    mine = {**flat(config), "the SHA-256 of the data set in data.path": dataset_sha256}
    sums = world.gather_objects(settings_sha256(mine))
    if len(set(sums)) == 1:
        return
    all_settings = world.gather_objects((platform.node(), mine))
    host_of_first, first = all_settings[0]
    rank = next(rank for rank, digest in enumerate(sums) if digest != sums[0])
    host, other = all_settings[rank]
    key = differing_keys(first, other)[0]
    raise UserError(
        f"the ranks don't run the same job: {key} is {other.get(key)} on rank {rank} ({host}) and {first.get(key)} on "
        f"rank 0 ({host_of_first}): expected the same configuration and data on every node"
    )


def require_shared_folder(run: Path, world: World, patience_s: float = VISIBLE_WITHIN_S) -> None:
    """Rank 0 writes a file in the run's folder that all ranks must find; a collective.

    Raises:
        UserError: on all ranks, if one does not find it because its output_dir is another folder of the same name.
    """
    if world.size == 1:
        return
    path, token = run / TOKEN_FILE, world.of_first(uuid.uuid4().hex)
    if world.rank == 0:
        write_text(path, token, run)
    world.barrier()
    hosts = world.gather_objects(None if _holds(path, token, patience_s) else platform.node())
    if world.rank == 0:
        path.unlink(missing_ok=True)
    for rank, host in enumerate(hosts):
        if host is not None:
            raise UserError(
                f"output_dir {run}: rank {rank} ({host}) doesn't see what rank 0 writes there: expected one folder that "
                "all nodes share"
            )


def _holds(path: Path, token: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            if read_text(path, path.parent) == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
