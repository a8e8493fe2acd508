"""Kills `prepare` and `add_events` repeatedly with SIGKILL and checks what is left. test_killed.py starts this program.

    python -m tests.prepare.killed FOLDER prepare|add|add-without-exchange STRIDE

It kills at every STRIDE-th file operation of Python (an audit hook counts them) and at some times in between, while DuckDB and
Parquet work. Every attempt is a fork of this process, which has imported all modules and runs no threads. A failure ends the
process with a traceback.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mme.prepare import replacement
from mme.prepare.pipeline import add_events, prepare
from mme.prepare.writer import DatasetWriter

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "shutil.rmtree"}
DELAYS_S = [0.01, 0.02, 0.04, 0.07, 0.1, 0.15]


def write_days(folder: Path) -> None:
    for day in range(2):
        events = [(user, item, day * 1000 + item) for user in range(40) for item in range(user % 5, 9 + day * 3)]
        users, items, times = zip(*events, strict=True)
        pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), folder / f"{day}.parquet")


def content(folder: Path) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]


def die_at(number: int, folder: Path) -> None:
    """Ends this process by SIGKILL when it is about to do its operation number ``number`` in ``folder``."""
    left = [number]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        path = str(arguments[0]) if arguments else ""
        # A tree is removed by names relative to an open folder.
        if event in WATCHED and path and (path.startswith(str(folder)) or not path.startswith("/")):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def in_child(work: Callable[[], object]) -> int:
    """Does ``work`` in a fork and returns the signal that ended it, or 0 if it finished."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a child failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main(folder: Path, scenario: str, stride: int) -> None:
    DatasetWriter.__init__.__defaults__ = (100,)  # several parts
    write_days(folder)
    work = folder / "work"
    out = work / "set"
    days = [folder / "0.parquet", folder / "1.parquet"]

    def change() -> None:
        if scenario == "add-without-exchange":
            replacement._exchange = lambda first, second: False  # type: ignore[assignment]
        if scenario == "prepare":
            prepare(days, "parquet", out)
        else:
            add_events(days[1:], out)

    in_child(lambda: prepare(days[:1], "parquet", out))
    shutil.copytree(work, folder / "old")
    in_child(change)
    old, new = content(folder / "old" / "set"), content(out)
    assert old != new

    def attempt(prepare_to_die: Callable[[], object]) -> bool:
        """Makes one attempt and returns whether it was killed."""
        shutil.rmtree(work)
        shutil.copytree(folder / "old", work)

        def die_changing() -> None:
            prepare_to_die()
            change()

        killed = in_child(die_changing)
        if out.exists() or scenario != "add-without-exchange":
            assert content(out) in (old, new), f"half a set: {sorted(os.listdir(out))}"
        if killed:
            in_child(change)
        assert os.listdir(work) == ["set"], os.listdir(work)
        # Events that are added to a set that has them already occur once, although they are counted as read twice.
        found = dict(content(out))
        assert {name: data for name, data in found.items() if name != "dataset.json"} == {
            name: data for name, data in new if name != "dataset.json"
        }
        return bool(killed)

    kills = 0
    number = 0
    while attempt(partial(die_at, number, work)):
        kills += 1
        number += stride
    for delay in DELAYS_S:
        kills += attempt(partial(signal.setitimer, signal.ITIMER_REAL, delay))
    print(f"{kills} kills survived")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
