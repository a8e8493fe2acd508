"""Parses JSON of possibly damaged files into typed records; errors name the field."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def parse_record(text: str, kind: type[T]) -> T:
    """Parses the JSON ``text`` as a ``kind``, a dataclass or TypedDict whose fields must exist with their types.

    Raises:
        ValueError: one line, such as ``parts[1].events: Field required``.
    """
    try:
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]
        return adapter.validate_json(text, strict=True)
    except ValidationError as error:
        flaw = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in flaw["loc"]).lstrip(".")
        raise ValueError(f"{place}: {flaw['msg']}" if place else flaw["msg"]) from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
