"""Quotes in CSV may enclose line breaks at any file size, stray quotes hide no rows, and every line is counted."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mme.errors import UserError
from mme.prepare import text_reader
from mme.prepare.pipeline import prepare
from mme.prepare.quoting import OpenQuote, RecordSplitter
from tests.prepare.test_formats import read

ROWS = 60


def write_rows(path: Path, titles: dict[int, str], separator: str = ",", newline: str = "\n", rows: int = ROWS) -> Path:
    """Rows of 5 users with the text ``titles`` (as written) in some of them."""
    lines = [separator.join(["user", "title", "item", "time"])]
    lines += [separator.join([f"u{n % 5}", titles.get(n, "thing"), f"i{n}", str(1000 + n)]) for n in range(rows)]
    path.write_bytes(newline.join([*lines, ""]).encode())
    return path


def expected(rows: int = ROWS) -> dict[Any, Any]:
    return {f"u{user}": [(f"i{n}", 1000 + n) for n in range(user, rows, 5)] for user in range(5)}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize(
    "titles",
    [
        {7: '"Hello'},
        {7: '"Hello', 31: '"again', 50: '5" disk'},
        {7: '"quoted" word', 8: '5" x 3"', 9: 'a "b" c'},
        {7: '"two\nlines"', 8: '"a ""b""\n\nc"', 9: '"x"'},
        {59: '"Hello'},
        {0: '"a', 1: '""', 2: 'x"y', 3: '""""'},
    ],
)
def test_no_row_is_lost(tmp_path: Path, titles: dict[int, str], separator: str, newline: str) -> None:
    file = write_rows(tmp_path / "a.csv", titles, separator, newline)
    info = prepare([file], "auto", tmp_path / "out")
    assert (info["rows_read"], info["malformed_rows"]) == (ROWS, 0)
    assert read(tmp_path / "out") == expected()


@pytest.mark.parametrize("titles", [{7: '"Hello', 12: 'world"'}, {7: '"Hello', 8: '"'}])
def test_a_quote_that_closes_after_rows_is_refused(tmp_path: Path, titles: dict[int, str]) -> None:
    file = write_rows(tmp_path / "a.csv", titles)
    with pytest.raises(
        UserError, match=r"a.csv: line 9: a quote opens here and closes \d lines? later.*--quoting literal"
    ):
        prepare([file], "auto", tmp_path / "out")
    assert prepare([file], "auto", tmp_path / "out", quoting="literal")["malformed_rows"] == 0
    assert read(tmp_path / "out") == expected()
    found = prepare([file], "auto", tmp_path / "out", quoting="standard", max_malformed_share=0.1)
    assert found["num_events"] < ROWS


def test_standard_quoting_names_the_quote_that_stays_open(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.csv", {7: '"Hello'})
    with pytest.raises(UserError, match=r"a.csv: line 9: a quote opens here that is never closed"):
        prepare([file], "auto", tmp_path / "out", quoting="standard")


@pytest.mark.parametrize("block_bytes", [64, 100, 1000])
def test_blocks_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    """Fields of many lines extend over blocks, and messages still name the right line of malformed rows."""
    titles = {n: '"one\n' + "more, \n" * n + 'last"' for n in range(0, ROWS, 7)} | {11: '"stray', 40: "a,b"}
    file = write_rows(tmp_path / "a.csv", titles)
    lines = file.read_text().split("\n")
    monkeypatch.setattr(text_reader, "BLOCK_BYTES", block_bytes)
    info = prepare([file], "auto", tmp_path / "out", max_malformed_share=0.1)
    assert (info["rows_read"], info["malformed_rows"]) == (ROWS, 1)
    number = 1 + next(n for n, line in enumerate(lines) if "a,b" in line)
    assert info["malformed"] == {"wrong number of fields": {"rows": 1, "first": [f"a.csv line {number}"]}}


def test_quoted_line_breaks_beyond_a_block(tmp_path: Path) -> None:
    """The file has more than 8 MiB, with the line break at the end of a block."""
    rows = 3000
    titles = dict.fromkeys(range(0, rows, 2), '"' + "words\n" * 1000 + '"')
    file = write_rows(tmp_path / "a.csv", titles, rows=rows)
    assert file.stat().st_size > text_reader.BLOCK_BYTES
    info = prepare([file], "auto", tmp_path / "out")
    assert (info["rows_read"], info["malformed_rows"]) == (rows, 0)
    assert read(tmp_path / "out") == expected(rows)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.text('ab ,"\n', max_size=6), min_size=3, max_size=3), min_size=1, max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 60),
)
def test_records_are_those_of_the_csv_module(rows: list[list[str]], newline: str, cut: int) -> None:
    """Everything that the standard writer writes is read back, whatever the size of blocks."""
    out = io.StringIO()
    csv.writer(out, lineterminator=newline, quoting=csv.QUOTE_MINIMAL).writerows(rows)
    data = out.getvalue().encode()
    splitter = RecordSplitter(",", 3, 2, "standard")
    records, rest = 0, b""
    for start in range(0, len(data), cut):
        buffer = rest + data[start : start + cut]
        is_last = start + cut >= len(data)
        end = len(buffer) if is_last else buffer.rfind(b"\n") + 1
        found = splitter.split(buffer[:end], is_last) if end else None
        rest = buffer[end:] if found is None else found.rest + buffer[end:]
        if found is not None:
            records += found.num_lines if found.lines is None else found.lines.size
    assert (records, rest) == (len(rows), b"")


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=60).map(lambda data: bytes(b'12,"\n\rx'[byte % 7] for byte in data)))
def test_every_line_is_part_of_one_record(block: bytes) -> None:
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    for quoting in ("auto", "literal"):
        try:
            found = RecordSplitter(",", 3, 2, quoting).split(block, is_last=True)  # type: ignore[arg-type]
        except OpenQuote as error:
            assert b'"' in block.split(b"\n")[error.line]
            continue
        assert (found.num_lines, found.rest) == (num_lines, b"")
