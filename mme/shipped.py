"""Files that come with the project beside its code: configurations under `configs/` and pins under `requirements/`."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
IN_WHEEL = PACKAGE / "shipped_files"  # setup.py copies the folders there when it builds a wheel


def shipped(name: str | Path) -> Path:
    """Where a shipped file such as ``configs/quickstart.yaml`` stands: in the installed package or in the checkout."""
    return (IN_WHEEL if IN_WHEEL.is_dir() else PACKAGE.parent) / name


def own_or_shipped(path: Path) -> Path:
    """The user's file where there is one, otherwise the shipped one of the same relative name, otherwise ``path``."""
    if path.exists() or path.is_absolute() or path.parts[:1] != ("configs",) or ".." in path.parts:
        return path
    found = shipped(path)
    return found if found.is_file() else path
