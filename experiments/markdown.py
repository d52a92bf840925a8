"""Tables in Markdown, for the report."""

from collections.abc import Sequence
from typing import Any


def markdown(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a row of column names."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
