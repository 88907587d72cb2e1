"""What the site has beyond the pages in docs/: notebooks, the reference, formulas as MathML.

Formulas are converted when the site is built, so that a page needs no script and no other host.
"""

import ast
import html
import importlib
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import SimpleTextInlineProcessor
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

import pyrodiff

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pyrodiff"
MATH = re.compile(r"<(span|div) class=\"arithmatex\">\\[(\[](.*?)\\[)\]]</\1>", re.DOTALL)
DOLLARS = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?! )([^$]+?)(?<! )\$(?![\d$])", re.DOTALL)
CELL, CODE = re.compile(r"<td.*?</td>", re.DOTALL), re.compile(r"<code>([^<]*)</code>")
VERBATIM = re.compile(r"(<(pre|code|script|style|svg)\b.*?</\2>|<[^>]*>)", re.DOTALL)


def modules() -> dict[str, str]:
    """Page of the reference by the name of the module; a package's page comes first in its own."""
    pages = {}
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (p.parent, p.stem != "__init__", p)):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names = [part for part in parts if part != "__init__"]
        if not any(name.startswith("_") for name in names):
            last = "index" if parts[-1] == "__init__" else parts[-1]
            pages[".".join(["pyrodiff", *names])] = "/".join(
                ["reference", *parts[:-1], f"{last}.md"]
            )
    return pages


def notebooks() -> dict[str, str]:
    """Path of each notebook by its title."""
    paths = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
        heading = re.search(r"^# (.+)$", text, re.MULTILINE)
        title = heading[1] if heading else path.stem
        paths[title.replace("`", "")] = path.relative_to(ROOT).as_posix()
    return paths


def _reference() -> list[Any]:
    """Modules as entries of the navigation, those of a package in a section of their own."""
    sections: dict[str, list[Any]] = {"": []}
    for name, page in modules().items():
        if name == "pyrodiff":
            continue
        _, *above, last = name.split(".")
        if page.endswith("/index.md"):
            sections[name] = [page]
            entry = {last: sections[name]}
        else:
            entry = {last: page}
        sections[".".join(["pyrodiff", *above]) if above else ""].append(entry)
    entries = sorted(sections[""], key=lambda entry: next(iter(entry)))
    public = [entry for entry in entries if next(iter(entry)) in dir(pyrodiff)]
    others = [entry for entry in entries if entry not in public]
    return [modules()["pyrodiff"], *public, {"Internal modules": others}]


def _page(name: str) -> str:
    """A module; of a package, what it defines itself and links to what it passes on."""
    path = PACKAGE.joinpath(*name.split(".")[1:], "__init__.py")
    if name == "pyrodiff":
        return _flat_names()
    if not path.exists():
        return f"::: {name}\n"
    tree = ast.parse(path.read_text("utf-8")).body
    defined = [node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    public = [definition for definition in defined if not definition.startswith("_")]
    imported = {
        alias.name: f"{node.module}.{alias.name}"
        for node in tree
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(name)
        for alias in node.names
    }
    module = importlib.import_module(name)
    links = [
        f"- [`{name}.{exported}`][{_definition(imported[exported])}]"
        for exported in getattr(module, "__all__", ())
        if exported in imported and callable(getattr(module, exported))
    ]
    members = f"    options: {{members: {json.dumps(public) if public else 'false'}}}"
    return "\n".join([f"::: {name}", members, "", "## Names", "", *links, ""])


def _flat_names() -> str:
    """The first page: the names that the package passes on, by the module that defines them."""
    rows: dict[str, list[str]] = {}
    for name in pyrodiff.__all__:
        target = _definition(f"pyrodiff.{name}")
        if callable(getattr(pyrodiff, name)):
            room = target.split(".")[1]
            rows.setdefault(room, []).append(f"[`{name}`][{target}]")
    table = [
        f"| [`{room}`][pyrodiff.{room}] | {', '.join(links)} |" for room, links in rows.items()
    ]
    header = ["| defined in | names of `pyrodiff` itself |", "|---|---|"]
    return "\n".join(["::: pyrodiff", "    options: {members: false}", "", *header, *table, ""])


class NoUnderscores(Extension):
    """Stars alone emphasise: the underscores here belong to formulas."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  (Markdown's name)
        md.inlinePatterns.register(SimpleTextInlineProcessor("(_+)"), "underscores", 65)


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(NoUnderscores())
    start, *rest = config.nav
    lessons = [{title: path} for title, path in notebooks().items()]
    tutorials = [{"Tutorials": lessons}] if lessons else []
    config.nav = [start, *tutorials, *rest, {"Reference": _reference()}]
    return config


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: Any) -> Files:
    for path in notebooks().values():
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    for name, page in modules().items():
        files.append(File.generated(config, page, content=_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Names of the library in the notes' tables become links into the reference."""
    if page.file.src_uri != "notes_to_code.md":
        return markdown
    return re.sub(r"`(pyrodiff(?:\.\w+)+)`", lambda match: _link(match[1]), markdown)


def _link(name: str) -> str:
    return f"[`{name}`][{_definition(name)}]"


def _definition(name: str) -> str:
    """The name under which the reference has it: that of the module in which it is defined."""
    path = name.split(".")
    count = max(n for n in range(1, len(path) + 1) if ".".join(path[:n]) in modules())
    module = importlib.import_module(".".join(path[:count]))
    if count < len(path):
        home = getattr(getattr(module, path[count], None), "__module__", None) or ""
        if home.startswith("pyrodiff."):
            return ".".join([home, *path[count:]])
    return name


def mathml(tex: str, display: bool) -> str:
    one_line = " ".join(html.unescape(tex).split("\n")).strip()  # "\\" at a line's end is a space
    converted = convert(one_line, display="block" if display else "inline")
    if "\\" in converted:
        raise ValueError(f"Expected a formula that converts as a whole; got {tex!r}.")
    return re.sub(
        r"(?<!<msu.>)(<mi>(?:log|exp)</mi>)(?=<m[isn])", r"\1<mspace width='0.17em'/>", converted
    )


def on_page_content(content: str, page: Any, **_: Any) -> str:
    content = MATH.sub(lambda match: mathml(match[2], match[1] == "div"), content)
    if page.file.src_uri.endswith(".ipynb"):
        content = _notebook(content)
    return CELL.sub(lambda cell: CODE.sub(_breakable, cell[0]), content)


def _breakable(code: re.Match[str]) -> str:
    """Code in a cell may be broken after a dot, bracket or underscore, and never at a hyphen."""
    text = re.sub(r"(?<=[\w)])([._=(]|::)(?=\w)", r"\1<wbr>", code[1])
    text = re.sub(r"(?<!\S)--?\w[\w-]*", r'<span class="option">\g<0></span>', text)
    return f"<code>{text}</code>"


def _notebook(content: str) -> str:
    """Formulas of a notebook's text; links to pages of docs/; no script from another host."""
    content = re.sub(r"<script\b[^>]*>.*?</script>", "", content, flags=re.DOTALL)
    content = re.sub(r'href="\.\./docs/([\w/]+)\.md', r'href="../../\1/', content)
    content = re.sub(r'href="(?!https?:)([\w/]+)\.ipynb', r'href="../\1/', content)
    pieces = VERBATIM.split(content)
    text = pieces[::3]
    rest = [pieces[i] for i in range(1, len(pieces), 3)]
    done = [DOLLARS.sub(lambda f: mathml(f[1] or f[2], f[1] is not None), piece) for piece in text]
    return "".join(piece for pair in zip(done, [*rest, ""], strict=True) for piece in pair)
