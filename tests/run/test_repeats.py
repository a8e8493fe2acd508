"""No line fills a log, however often it is repeated."""

from __future__ import annotations

import io
import logging
import math

from mme.run.repeats import MOST_KINDS, LibraryLog, RepeatLimit


def test_a_repeated_line_is_written_at_powers_of_ten_with_its_count() -> None:
    limit = RepeatLimit()
    written = [line for step in range(1, 1001) if (line := limit.line(f"step {step} is slow"))]
    assert written == [
        "step 1 is slow",
        "step 10 is slow (10 times so far)",
        "step 100 is slow (100 times so far)",
        "step 1000 is slow (1,000 times so far)",
    ]
    assert limit.line("another") == "another"


def test_endless_kinds_of_lines_stop() -> None:
    limit = RepeatLimit()
    letters = [f"{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(2 * MOST_KINDS)]
    assert sum(limit.line(text) is not None for text in letters) == MOST_KINDS


def test_what_libraries_warn_of_at_each_step_grows_a_log_by_its_logarithm() -> None:
    stream = io.StringIO()
    handler = LibraryLog(stream)
    logging.getLogger().addHandler(handler)
    try:
        for step in range(10_000):
            logging.getLogger("py.warnings").warning("%s", f"a.py:979: UserWarning: it happened again ({step})\n")
            logging.getLogger("other").error("failed %d", step)
    finally:
        logging.getLogger().removeHandler(handler)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 * (1 + math.log10(10_000))
    assert lines[0].endswith("py.warnings: a.py:979: UserWarning: it happened again (0)")
    assert lines[-1].endswith("other: failed 9999 (10,000 times so far)")
