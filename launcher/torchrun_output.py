"""Tells the lines of torchrun itself from those of the workers, on the standard error that they share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import IO

LOG_LINE = re.compile(r"^[IWEC]\d{4} [\d:.]+ \d+ \S*torch/distributed/")
LAST_WORDS = "torch.distributed.elastic."  # the module of the exceptions with which torchrun ends
# What torch's C++ writes of a connection, with its stack: the exception that follows is told in one line.
NATIVE_LINE = re.compile(r"\[[IWE]\d{4} .*\] \[c10d\] |Exception raised from |frame #\d+: |<omitting python frames>")
TRACEBACK = "Traceback (most recent call last):"
FOLLOWS = ("The above exception was the direct cause", "During handling of the above exception")


def own_lines(stream: IO[str], on_log_line: Callable[[str], None]) -> Iterator[str]:
    """The lines of ``stream`` that torchrun did not write; its log lines and last words go to ``on_log_line``."""
    held: list[str] = []  # a traceback, with those that it followed from, until the line after it tells whose it is
    complete = False
    for line in stream:
        if LOG_LINE.match(line):
            on_log_line(line)
        elif NATIVE_LINE.match(line):
            continue
        elif held and line.startswith(LAST_WORDS):
            on_log_line(line)
            for _ in stream:  # the summary of the failed workers, the last that torchrun writes
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
