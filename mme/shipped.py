"""Files that the project ships besides its code: configurations in `configs/` and pins in `requirements/`."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IN_WHEEL = PACKAGE / "shipped_files"  # setup.py copies the folders there when it builds a wheel


def shipped(name: str | Path) -> Path:
    """The path of a shipped file such as ``configs/quickstart.yaml``, in the installed package or the checkout."""
    return (IN_WHEEL if IN_WHEEL.is_dir() else PACKAGE.parent) / name


def own_or_shipped(path: Path) -> Path:
    """The user's file if it exists, otherwise the shipped file with the same relative path, otherwise ``path``."""
    if path.exists() or path.is_absolute() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    found = shipped(path)
    return found if found.is_file() else path
