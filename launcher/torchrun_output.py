"""Separates torchrun's own lines from those of the workers, which share its standard error, and writes the launcher's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from typing import IO

from mme.errors import one_line

LOG_LINE = re.compile(r"^[IWEC]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
LAST_WORDS = "torch.distributed.elastic."  # the module of the exceptions that end torchrun
# Log lines and stacks of torch's C++ about a connection. An exception follows, which is reported in one line.
NATIVE_LINE = re.compile(r"\[[IWE]\d{4} .*\] \[c10d\] |Exception raised from |frame #\d+: |<omitting python frames>")
TRACEBACK = "Traceback (most recent call last):"
FOLLOWS = ("The above exception was the direct cause", "During handling of the above exception")


def own_lines(stream: IO[str], on_log_line: Callable[[str], None]) -> Iterator[str]:
    """Yields the workers' lines; passes torchrun's log lines and its final exception to ``on_log_line``."""
    held: list[str] = []  # a traceback and its causes, until the next line shows who wrote it
    complete = False
    for line in stream:
        if LOG_LINE.match(line):
            on_log_line(line)
        elif NATIVE_LINE.match(line):
            continue
        elif held and line.startswith(LAST_WORDS):
            on_log_line(line)
            for _ in stream:  # the summary of failed workers, which ends torchrun's output
                pass
            return
        elif held and (line[:1].isspace() or line.startswith(FOLLOWS)):
            held.append(line)
        elif held and not complete:
            held.append(line)
            complete = True
        elif held and line.startswith(TRACEBACK) and any(text.startswith(FOLLOWS) for text in held[-3:]):
            held.append(line)
            complete = False
        else:
            yield from held
            held, complete = [], False
            if line.startswith(TRACEBACK):
                held = [line]
            else:
                yield line
    yield from held


def say(text: str) -> None:
    """Prints ``text`` as one line of the launcher on standard error."""
    print(f"launcher: {one_line(text)}", file=sys.stderr, flush=True)
