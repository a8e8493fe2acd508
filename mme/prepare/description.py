"""Describes to the user what each file was recognised as, column by column."""

from __future__ import annotations

from itertools import groupby

from mme.data.layout import FEATURE_PREFIX
from mme.errors import one_line
from mme.prepare.ids import IdColumn
from mme.prepare.readers import ROLES, SourceFile

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar", ":": "colon"}


def describe_sources(sources: list[SourceFile], ids: dict[str, IdColumn]) -> str:
    """One entry per group of consecutive files of the same form, and a warning if their times differ in unit."""
    lines = []
    for text, group in groupby(sources, lambda source: _describe(source, ids)):
        files = list(group)
        more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
        lines += [f"{one_line(str(files[0].path))}{more}: {text}"]
    forms = {str(source.time_form): source.path for source in sources if source.time_form}
    if len(forms) > 1:
        places = "; ".join(f"{path}: {form}" for form, path in forms.items())
        lines.append(f"warning: times are written in different ways ({one_line(places)})")
    return "\n".join(lines)


def _describe(source: SourceFile, ids: dict[str, IdColumn]) -> str:
    kinds = {"parquet": "Parquet", "arrow": "Arrow", "json": "JSON lines", "text": "CSV"}
    text = kinds[source.kind]
    if source.kind == "text":
        header = "with a header" if source.layout.header_lines else "without a header"
        text += f", separated by {SEPARATORS[source.layout.separator]}, {header}"
    if source.format not in ("parquet", "arrow", "json", "csv"):
        text += f", as {source.format} publishes it"
    for role in dict.fromkeys([*ROLES, *source.columns]):
        what = ""
        if role == "timestamp":
            what = f" ({source.time_form})" if source.time_form else ""
        elif role in ids:
            what = f" ({ids[role].kind} ids)" if ids[role].kind else ""
        label = "feature" if role.startswith(FEATURE_PREFIX) else role.replace("_", " ")
        text += f"\n  {label}: column {one_line(source.columns[role])}{what}"
    return text
