"""Links and commands in README, docs/ and the head comments of configurations and benchmarks work.

A command counts as one that runs if its program parses it: subcommand, options, their types, and, where a shipped
configuration is named, its overrides.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import launcher.__main__
import mme.cli
from mme.config import load_config
from mme.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PROGRAMS = {
    "mme": mme.cli.app,
    ".venv/bin/mme": mme.cli.app,
    "mme-launch": launcher.__main__.app,
    "python -m mme": mme.cli.app,
    "python -m launcher": launcher.__main__.app,
}
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
COMMAND = re.compile(
    r"(\S+=\S+ )?(make [a-z-]+( |$)|(torchrun .*|python )-m [\w.]+|(\.venv/bin/)?mme [a-z]+ .*--|mme-launch [a-z]+( --|$))"
)
PATH = re.compile(r"`(?P<path>(?:mme|kernels|launcher|benchmarks|tests|configs|docs|requirements|scripts)/[\w./-]*)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", file):
            continue
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"
    for path in PATH.findall(page.read_text()):
        assert (REPOSITORY / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("source", [*PAGES, "configs", "benchmarks", "help"], ids=lambda source: Path(source).name)
def test_commands_parse(source: Path | str) -> None:
    for command in commands_in(text_of(source)):
        check(command)


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(LINK.findall(PAGES[0].read_text()))
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked


def test_a_wrong_command_is_noticed() -> None:
    for wrong in ("mme train --confg F", "python -m benchmarks.nothing", "make trian", "mme train --config configs/quickstart.yaml train.ste=1"):  # fmt: skip
        with pytest.raises((typer.TyperException, ImportError, AssertionError, UserError)):
            check(wrong)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def text_of(source: Path | str) -> str:
    """The text of a page, of the head comments of all configurations or benchmarks, or of all help texts."""
    if isinstance(source, Path):
        return source.read_text()
    if source == "configs":
        return "\n".join(path.read_text() for path in (REPOSITORY / "configs").glob("*.yaml"))
    if source == "benchmarks":
        files = [*(REPOSITORY / "benchmarks").glob("*.py"), REPOSITORY / "kernels" / "aot.py"]
        return "\n".join(ast.get_docstring(ast.parse(path.read_text())) or "" for path in files)
    functions = [
        command.callback for app in {*PROGRAMS.values()} for command in [*app.registered_commands, app.registered_callback]
    ]  # fmt: skip
    return "\n".join(function.__doc__ or "" for function in functions)


def commands_in(text: str) -> Iterator[str]:
    """The commands of a text, each on one line: those on separate lines and those in backticks."""
    for line in text.replace("\\\n", " ").splitlines():
        candidates = [re.sub(r"^#?\s*", "", line), *re.findall(r"`([^`]+)`", line)]
        yield from (candidate for candidate in candidates if COMMAND.match(candidate))


def check(command: str) -> None:
    """Raises if the command's program would reject its arguments."""
    plain = re.sub(r"\[(--[\w-]+)\]", r"\1", command)  # optional arguments
    words = shlex.split(re.sub(r"\(.*\)$|>.*$|…$", "", plain), comments=True)  # without remarks and redirections
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets), command
        return
    if "torchrun" in words[0]:
        words = ["python", *words[words.index("-m") :]]
    program, arguments = (" ".join(words[:3]), words[3:]) if words[0] == "python" else (words[0], words[1:])
    app = PROGRAMS.get(program) or app_of(program.removeprefix("python -m "))
    parse(typer.main.get_command(app), arguments)
    if "--config" in arguments and arguments[arguments.index("--config") + 1].startswith("configs/"):
        path = REPOSITORY / arguments[arguments.index("--config") + 1]
        load_config(path, [word for word in arguments if re.match(r"[a-z]\w*(\.\w+)*=", word)])


def app_of(module: str) -> typer.Typer:
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    return app


def parse(command: Any, arguments: list[str]) -> None:
    if not arguments and command.no_args_is_help:
        return  # only its name
    context = command.make_context("", list(arguments))
    if hasattr(command, "commands"):
        _, subcommand, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        parse(subcommand, rest)
