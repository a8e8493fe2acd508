"""Random changes of files: of their bytes, of values in JSON and YAML, and of the kind of file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TEXTS = [
    b",",
    b"\n",
    b'"',
    b"\0",
    b"\xff",
    b"NaN",
    b"-1",
    b"9" * 30,
    b"1e999",
    b"\r\n",
    b"\x1b[2J",
    b"{",
    b"[",
    b"${oc.env:HOME}",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../mine",
    "/dev/zero",
    "a\nb",
    "a\0b",
    "${oc.env:HOME}",
    "x" * 5000,
    "\ud800",
    "\x1b[2J\u202e",
    [],
    [[]],
    [1, None],
    {},
    {"": None},
]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to four changes at random places."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        place = rng.randrange(len(data) + 1)
        length = rng.choice([1, 2, 8, 64, 1024])
        match rng.randrange(6):
            case 0:
                data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
            case 1:
                data = data[:place] + data[place + length :]
            case 2:
                data = data[:place] + rng.randbytes(length) + data[place:]
            case 3:
                data = data[:place] + data[place : place + length] * 2 + data[place + length :]
            case 4:
                data = data[:place] + rng.choice(TEXTS) + data[place:]
            case _:
                data = data[:place]
    return data


def change_value(rng: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which one value, anywhere in it, is replaced, removed or duplicated."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return rng.choice(VALUES)
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, list):
            container.insert(key, container[key])
        case 2 if isinstance(container, dict):
            container[rng.choice(["", "x", "a\nb", *container])] = container.pop(key)
        case _:
            container[key] = rng.choice(VALUES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in list(items):
        yield value, key
        yield from _places(below)


def change_kind(rng: random.Random, path: Path, mine: Path) -> None:
    """Replaces the file by a link to a file of the user or to its folder, by a pipe, a folder or nothing."""
    path.unlink()
    make: Callable[[], Any] = rng.choice(
        [
            lambda: path.symlink_to(mine),
            lambda: path.symlink_to(mine.parent),
            lambda: path.symlink_to("/dev/zero"),
            lambda: os.mkfifo(path),
            path.mkdir,
            lambda: None,
        ]
    )
    make()


def change_file(rng: random.Random, path: Path, mine: Path) -> None:
    """Applies any of these changes to one file; most changes of a JSON file keep it valid JSON."""
    kind = rng.randrange(10)
    if kind == 0:
        change_kind(rng, path, mine)
    elif path.suffix == ".json" and kind < 7:
        path.write_text(json.dumps(change_value(rng, json.loads(path.read_text()))))
    elif path.suffix == ".jsonl" and kind < 7:
        lines = path.read_text().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(change_value(rng, json.loads(lines[number])))
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_bytes(change_bytes(rng, path.read_bytes()))
