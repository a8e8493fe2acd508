"""Runs cases, each in a separate folder, next to files of the user that must not change.

Seeds and the number of cases come from the environment: MME_FUZZ_SEEDS ("0", or several such as "0 1 2") and MME_FUZZ_CASES (100
of each kind by default). A failure names its seed and case; the changed files stay in pytest's temporary folder.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mme.errors import NonFiniteError, UserError, one_line

CASES = [
    (seed, number)
    for seed in os.environ.get("MME_FUZZ_SEEDS", "0").split()
    for number in range(int(os.environ.get("MME_FUZZ_CASES", "100")))
]
LONGEST_S = 60
SKIPPED = "checkpoint skipped: "


class Bench:
    """The cases of one kind.

    Attributes:
        mine: a file of the user; no case may change it or add another next to it.
        succeeded, refused: the number of cases that succeeded and that were rejected.
    """

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
        self.folder, self.capfd, self.kind = folder, capfd, kind
        self.mine = folder / "mine" / "canary"
        self.mine.parent.mkdir()
        self.mine.write_text("mine")
        self.succeeded = self.refused = 0

    def cases(self) -> Iterator[tuple[random.Random, Path]]:
        """The random numbers and the folder of each case."""
        for seed, number in CASES:
            case = self.folder / f"{self.kind}-seed{seed}-case{number}"
            case.mkdir()
            yield random.Random(f"{self.kind}/{seed}/{number}"), case
            assert sorted(path.name for path in self.mine.parent.iterdir()) == ["canary"], case
            assert self.mine.read_text() == "mine", case
            shutil.rmtree(case)
        print(f"{self.kind}: {self.succeeded} succeeded, {self.refused} refused")
        # Otherwise the cases would show nothing. Only a changed export is never read, because it has a checksum.
        assert len(CASES) < 50 or (self.refused and (self.succeeded or self.kind == "test_export"))

    def run(self, main: Callable[[list[str]], int], *arguments: str | Path) -> bool:
        """Whether a command succeeded; if not, it must say why in one line and print no traceback."""
        self.capfd.readouterr()
        with in_time():
            status = main([str(argument) for argument in arguments])
        self.out, error = self.capfd.readouterr()
        assert status in (0, 1, 2), (status, arguments)
        assert "Traceback" not in error and "traceback in" not in error, error
        lines = [line for line in error.split("\n")[:-1] if not line.startswith(SKIPPED)]
        assert status == 0 or (len(lines) == 1 and lines[0].startswith("error: ")), error
        assert all(line.isprintable() for text in (self.out, error) for line in text.split("\n")), (self.out, error)
        return self._count(status == 0)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function, or None if it rejects its arguments in one line."""
        try:
            with in_time():
                found = function(*arguments)
        except (UserError, NonFiniteError) as error:
            assert str(error).strip() and "\n" not in one_line(str(error)), error
            self._count(False)
            return None
        self._count(True)
        return found

    def _count(self, has_succeeded: bool) -> bool:
        self.succeeded += has_succeeded
        self.refused += not has_succeeded
        return has_succeeded


@contextmanager
def in_time() -> Iterator[None]:
    """Ends a case that hangs."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LONGEST_S)
    try:
        yield
    finally:
        signal.alarm(0)


def _too_long(*_: object) -> None:
    raise AssertionError(f"not ended after {LONGEST_S} s")
