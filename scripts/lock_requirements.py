"""Writes requirements/locked/: the pins of requirements/ with the SHA-256 of every file that PyPI serves for them.

    python scripts/lock_requirements.py     run after changing a pin; needs uv (pip install uv)

`make setup` installs from there with `pip --require-hashes`, so that pip rejects a file that was replaced in an index. The
hashes cover all files of a version, for every platform and CPython 3.10 to 3.13. `torch-STACK.txt` contains PyPI's torch for
CUDA with the CUDA libraries that it needs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
LOCKED = REQUIREMENTS / "locked"
PYTHONS = ("3.10", "3.13")
HEADER = "# Written by scripts/lock_requirements.py from {source}: change that file and run the script.\n"

Hashes = dict[str, list[str]]  # by "name==version", the name normalised


def main() -> None:
    LOCKED.mkdir(exist_ok=True)
    for name in ("build", "common", "dev", "cpu", "cuda"):
        path = REQUIREMENTS / f"{name}.txt"
        pins = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        hashes: Hashes = {}
        for python in PYTHONS:
            hashes |= parse(compile_pins(pins, "--no-deps", "--python-version", python))
        locked = [with_hashes(pin, hashes) for pin in pins if not pin.startswith("torch==")]
        (LOCKED / path.name).write_text(HEADER.format(source=f"../{path.name}") + "".join(locked))
    for stack in ("cpu", "cuda"):
        lock_torch(stack)


def lock_torch(stack: str) -> None:
    """Locks torch of a stack and its dependencies that no other file pins."""
    elsewhere, constraints = set(), []
    for name in ("build", "common", stack):
        for line in (REQUIREMENTS / f"{name}.txt").read_text().splitlines():
            if "==" in line:
                elsewhere.add(normalized(line.partition("==")[0]))
                constraints += [line] if name == "common" else []
    (pin,) = [line for line in (REQUIREMENTS / f"{stack}.txt").read_text().splitlines() if line.startswith("torch==")]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(constraints))
        file.flush()
        text = compile_pins([pin], "--universal", "--python-version", PYTHONS[0], "--constraint", file.name)
    own = [block for block in blocks(text) if normalized(block.partition("==")[0]) not in elsewhere - {"torch"}]
    (LOCKED / f"torch-{stack}.txt").write_text(HEADER.format(source=f"../{stack}.txt") + "".join(own))


def compile_pins(pins: list[str], *options: str) -> str:
    """Compiles ``pins`` with uv, using only PyPI regardless of pip's configuration."""
    command = [
        "uv",
        "pip",
        "compile",
        "-",
        "--generate-hashes",
        "--no-header",
        "--no-annotate",
        "--no-python-downloads",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    command += ["--no-config", "--quiet", "--default-index", "https://pypi.org/simple"]
    done = subprocess.run(
        [*command, *options], input="\n".join(pins), env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"uv: {done.stderr.strip()}")
    return done.stdout


def blocks(text: str) -> list[str]:
    """Splits a requirements file into requirements with their lines of hashes."""
    return re.findall(r"^\S[^\n]*==[^\n]*\n(?:[ \t]+[^\n]*\n?)*", text, re.MULTILINE)


def parse(text: str) -> Hashes:
    found = {}
    for block in blocks(text):
        name, _, version = block.split()[0].partition("==")
        found[f"{normalized(name)}=={version}"] = re.findall(r"--hash=(sha256:[0-9a-f]{64})", block)
    return found


def with_hashes(pin: str, hashes: Hashes) -> str:
    name, _, version = pin.split(";")[0].strip().partition("==")
    lines = [pin, *(f"    --hash={each}" for each in sorted(hashes[f"{normalized(name)}=={version}"]))]
    return " \\\n".join(lines) + "\n"


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
