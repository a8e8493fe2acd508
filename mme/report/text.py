"""Makes text from files safe to show: escapes control characters and quotes words of a command for a shell."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mme.errors import one_line


def printable_lines(text: str) -> str:
    """A text of several lines, each escaped by `mme.errors.one_line`."""
    return "\n".join(map(one_line, text.split("\n")))


def shell_command(words: Sequence[str]) -> str:
    """A command for bash, on one line even if words contain line breaks."""
    return " ".join(map(_shell_word, words))


def _shell_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    escaped = "".join(
        {"\\": "\\\\", "'": "\\'"}.get(char, char) if char.isprintable() else _ansi_c(char) for char in word
    )
    return f"$'{escaped}'"


def _ansi_c(char: str) -> str:
    """The bytes of a character as escapes within bash's $'…'."""
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))
