"""Docstrings as they are written, so that Markdown shows them as a terminal does.

Aligned lists, tables and sessions become blocks of code; roles become code or formulas; the star
of ``(N, *event_shape)`` stays a star.  Special methods but ``__call__`` are left out.
"""

import re
from typing import Any

from griffe import Extension, Object

CODE = re.compile(r"(``.*?``|`.*?`)", re.DOTALL)
ROLES = {r":math:`(.+?)`": r"$\1$", r":\w+:`~?(.+?)`": r"`\1`"}


def _is_verbatim(lines: list[str]) -> bool:
    """A session, or columns held apart by spaces; indented lines are code already."""
    if lines[0].startswith(">>> "):
        return True
    columns = [bool(re.search(r"\S {3,}\S", line)) or line.startswith("    ") for line in lines]
    return not lines[0].startswith(" ") and len(lines) > 1 and all(columns)


def _prose(text: str) -> str:
    for role, plain in ROLES.items():
        text = re.sub(role, plain, text, flags=re.DOTALL)
    pieces = CODE.split(text)
    pieces[::2] = [re.sub(r"(?<=[(,\s])\*(?=[a-z_]+\))", r"\\*", piece) for piece in pieces[::2]]
    return "".join(pieces)


def _table(lines: list[str]) -> str:
    """A table whose columns are those of its rules of =."""
    edges = [rule.start() for rule in re.finditer(r"=+", lines[0])]
    pairs = list(zip(edges, [*edges[1:], None], strict=True))
    rows = [[line[a:b].strip() for a, b in pairs] for line in lines if not line.startswith("==")]
    rows.insert(1, ["---"] * len(edges))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _paragraph(text: str) -> str:
    lines = text.split("\n")
    if lines[0].startswith("==="):
        return _table(lines)
    if _is_verbatim(lines):
        return "\n".join(["```text", *lines, "```"])
    formula = re.match(r"( *)\.\. math::\s*(.*)", text, re.DOTALL)
    if formula:
        return f"{formula[1]}$$\n{formula[1]}{formula[2].strip()}\n{formula[1]}$$"
    return text if text.startswith("    ") and "    " * 2 in text[:12] else _prose(text)


def rendered(docstring: str) -> str:
    return "\n\n".join(_paragraph(part) for part in re.split(r"\n\s*\n", docstring))


class Docstrings(Extension):
    """Applied to every docstring once it is loaded."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if re.fullmatch(r"__(?!call)\w+__", obj.name) and obj.is_function:
            obj.public = False
        if obj.docstring is not None:
            obj.docstring.value = rendered(obj.docstring.value)
