"""Notices a hanging rank, names it, keeps what all ranks were doing and ends the job, so that torchrun starts it again.

Each rank reports its progress (`beat`), and a separate thread shares it through the process group's store. One hanging rank
stops the whole group, because the others wait for it in a collective. So all ranks notice at about the same time, and each
can name the rank to blame: one that does not answer at all, otherwise the one furthest behind, otherwise one that is not
itself waiting for the others. Each rank keeps the Python stacks of its threads, and from PyTorch's flight recorder its last
collectives, which show the one that some ranks have not joined.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C import _distributed_c10d

from mme.distributed.world import World
from mme.errors import one_line
from mme.files import make_folder, open_to_append, replacing
from mme.run.exit_status import print_error

STACKS_FOLDER = "stacks"  # in the run's folder
# PyTorch's torchfrtrace compares NCCL's ranks by the first file, whose name ends with the rank. The second is for people.
COLLECTIVES, COLLECTIVES_JSON = "collectives_rank_{}", "collectives_of_rank_{}.json"
RECORDED = 2000  # collectives that the flight recorder keeps
ANSWER_WITHIN_S = 5.0
LOOK_EVERY_S = 1.0
ORPHAN_LEAVES_AFTER_S = 60.0
WAITING = ("torch/distributed/", "torchrec/distributed/", "deepspeed/comm/")  # where collectives are waited for


class Watchdog:
    """Ends this process with status 1 if `beat` was not called for ``timeout_s`` (0: no limit).

    Also if torchrun has died, of which `Preemption` is notified first, and this process still exists a minute later.
    """

    def __init__(self, run: Path, world: World, timeout_s: float) -> None:
        self.folder, self.world, self.timeout_s = run / STACKS_FOLDER, world, timeout_s
        self._beats, self._doing, self._at = 0, "starting", time.monotonic()
        self._parent = os.getppid()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._stacks: Any = None

    def __enter__(self) -> Watchdog:
        if self.timeout_s:
            make_folder(self.folder, self.folder.parent)
            path = self.folder / f"rank_{self.world.rank}.txt"
            if path.exists() and path.stat().st_size:  # of an attempt that hung, whose message named this file
                path.rename(path.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.txt"))
            path.unlink(missing_ok=True)
            self._stacks, self._stacks_path = open_to_append(path, self.folder.parent), path
        self.beat("starting")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            self._stacks_path.unlink(missing_ok=True)
            with suppress(OSError):  # the other ranks' files may be there
                self.folder.rmdir()

    def beat(self, doing: str) -> None:
        """Reports that this rank makes progress, and what it does next."""
        self._beats, self._doing, self._at = self._beats + 1, doing, time.monotonic()
        if self._stacks is not None:
            # A thread in C, which does not need the GIL: it writes the stacks wherever this process hangs.
            faulthandler.dump_traceback_later(self.timeout_s, file=self._stacks)

    def _watch(self) -> None:
        orphan_since: float | None = None
        while not self._done.wait(LOOK_EVERY_S):
            now = time.monotonic()
            if os.getppid() != self._parent and "TORCHELASTIC_RUN_ID" in os.environ:
                orphan_since = orphan_since or now
                if now - orphan_since > ORPHAN_LEAVES_AFTER_S:
                    self._end("torchrun has died, and the other ranks do not answer")
            if self.timeout_s and now - self._at > self.timeout_s + LOOK_EVERY_S:
                # In a thread, because a library that is stuck might not answer.
                keeping = threading.Thread(target=self._keep_collectives, daemon=True)
                keeping.start()
                verdict = self._verdict()
                keeping.join(ANSWER_WITHIN_S)
                self._end(verdict)

    def _keep_collectives(self) -> None:
        """Writes the last collectives that the flight recorder has seen."""
        recorder = "nccl" if self.world.device.type == "cuda" else "fr"
        rank = self.world.rank
        for name, suffix in ((COLLECTIVES.format(rank), ""), (COLLECTIVES_JSON.format(rank), "_json")):
            dump = getattr(_distributed_c10d, f"_dump_{recorder}_trace{suffix}", None)
            with suppress(OSError, RuntimeError):
                if dump is not None:
                    with replacing(self.folder / name, self.folder.parent) as partial:
                        partial.write_bytes(dump())

    def _verdict(self) -> str:
        """Which rank hangs, by the ranks' reports; all ranks that report come to the same verdict."""
        reports = self._reports_in_time()
        if reports is None:
            return self._say(
                {0: "it holds the store of all ranks and does not answer: its process or the network to it failed"}
            )
        silent = [rank for rank in range(self.world.size) if rank not in reports]
        behind = min(report["beats"] for report in reports.values())
        slowest = [rank for rank, report in reports.items() if report["beats"] == behind]
        blamed = silent or [rank for rank in slowest if not reports[rank]["waits"]] or slowest
        doing = {rank: f"while {reports[rank]['doing']}" for rank in reports}
        return self._say({rank: doing.get(rank, "its process does not answer") for rank in blamed})

    def _say(self, blamed: dict[int, str]) -> str:
        ranks = ", ".join(f"rank {rank} hangs ({how})" for rank, how in blamed.items())
        kept = "stacks and last collectives"
        return f"{ranks}: no progress for {self.timeout_s:g} s; the ranks' {kept} are in {self.folder}"

    def _reports_in_time(self) -> dict[int, dict[str, Any]] | None:
        """As `_exchange_reports`, but with a time limit: on a node that is cut off it would wait for the network's timeout."""
        found: list[dict[int, dict[str, Any]] | None] = []
        thread = threading.Thread(target=lambda: found.append(self._exchange_reports()), daemon=True)
        thread.start()
        thread.join(2 * ANSWER_WITHIN_S)
        return found[0] if found else None

    def _exchange_reports(self) -> dict[int, dict[str, Any]] | None:
        """The reports of the ranks that answer; None if rank 0, which holds the store, does not.

        Ranks look once a second, so one that asks later than rank 0 may find it gone after reading its report.
        """
        mine = {"beats": self._beats, "doing": self._doing, "waits": _waits_for_others()}
        reports = {self.world.rank: mine}
        store = self.world.store
        until = time.monotonic() + ANSWER_WITHIN_S
        try:
            store.set(f"hang/{self.world.rank}", json.dumps(mine))
            while len(reports) < self.world.size and time.monotonic() < until:
                for rank in range(self.world.size):
                    if rank not in reports and store.check([f"hang/{rank}"]):
                        reports[rank] = json.loads(store.get(f"hang/{rank}"))
                time.sleep(0.1)
        except (dist.DistError, RuntimeError):
            return reports if 0 in reports else None
        # Ranks ask at different moments: none may leave before the last one has seen all answers.
        time.sleep(max(0.0, until - time.monotonic()))
        return reports

    def _end(self, why: str) -> NoReturn:
        with suppress(OSError):
            name = "log.txt" if self.world.rank == 0 else f"log.rank{self.world.rank}.txt"
            with open_to_append(self.folder.parent / name, self.folder.parent) as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error: {one_line(why)}\n")
        print_error(why)
        os._exit(1)  # the main thread hangs, so nothing else would end the process


def _waits_for_others() -> bool:
    """Whether a thread of this process is in a collective, judged by its innermost Python function."""
    innermost = [frame.f_code.co_filename for frame in sys._current_frames().values()]
    return any(place in file.replace(os.sep, "/") for file in innermost for place in WAITING)


def record_collectives() -> None:
    """Makes the process groups formed from now on record their last collectives, unless the environment says otherwise.

    PyTorch has renamed the variable; NCCL's groups still read the older name.
    """
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, str(RECORDED))
