"""The source of a package as a tree: its modules, their imports, and what `structure.py` counts."""

import ast
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANY = 6  # positional arguments
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make", "_field_defaults"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Module:
    """A source file: its name, its text as a tree, and where it stands."""

    name: str
    path: Path
    is_package: bool
    tree: ast.Module
    lines: int
    imports: set[str] = field(default_factory=set)

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


def read_package(folder: Path) -> dict[str, Module]:
    """The modules of a package by their names, with what they import from each other."""
    modules = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        text = path.read_text("utf-8")
        lines = len(text.splitlines())
        modules[name] = Module(name, path, is_package, ast.parse(text), lines)
    for module in modules.values():
        module.imports = _imports(module, modules)
    return modules


def _imports(module: Module, modules: dict[str, Module]) -> set[str]:
    targets: set[str] = set()
    for node in running_imports(module):
        for target in _targets(node, module, modules):
            parents = [target.rsplit(".", n)[0] for n in range(1, target.count(".") + 1)]
            inside = {p for p in parents if f"{module.name}.".startswith(f"{p}.")}
            targets |= ({target, *parents} - inside) & modules.keys()
    return targets - {module.name}


def running_imports(module: Module) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements that may run, wherever they stand."""
    body = module.tree.body
    lazy = any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in body)

    def visit(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not lazy:
            for child in node.orelse:
                yield from visit(child)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child)

    return visit(module.tree)


def _targets(
    node: ast.Import | ast.ImportFrom, module: Module, modules: dict[str, Module]
) -> Iterator[str]:
    """The modules that a statement names: ``from a import b`` names ``a.b`` where that is one."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in modules)
        return
    source = import_source(node, module)
    for alias in node.names:
        full = f"{source}.{alias.name}"
        if full in modules or source in modules:
            yield full if full in modules else source


def import_source(node: ast.ImportFrom, module: Module) -> str:
    """The full name of the module that a ``from`` names, relative or not."""
    if not node.level:
        return node.module or ""
    parts = module.package.split(".")
    above = parts[: len(parts) + 1 - node.level]
    return ".".join([*above, *([node.module] if node.module else [])])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components (Tarjan, 1972), each sorted, the largest first."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            start = stack.index(name)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(components, key=lambda names: (-len(names), names))


def import_graph(modules: dict[str, Module]) -> dict[str, set[str]]:
    return {name: module.imports for name, module in modules.items()}


def functions(modules: dict[str, Module]) -> dict[str, int]:
    """Lines of each function, nested ones and methods included, by "file:line name"."""
    return {
        f"{_file(module)}:{node.lineno} {node.name}": _length(node)
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, FUNCTIONS)
    }


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, docstring = node.body[0], ast.get_docstring(node)
    lines = (node.end_lineno or 0) - node.lineno + 1
    return lines - ((first.end_lineno or 0) - first.lineno + 1 if docstring is not None else 0)


def files(modules: dict[str, Module]) -> dict[str, int]:
    """Lines of each file."""
    return {_file(module): module.lines for module in modules.values()}


def _file(module: Module) -> str:
    depth = module.name.count(".") + (1 if module.is_package else 0)
    return module.path.relative_to(module.path.parents[depth]).as_posix()


def positional_calls(modules: dict[str, Module]) -> list[str]:
    """Where a call has six or more positional arguments."""
    return [
        f"{_file(module)}:{node.lineno} {ast.unparse(node.func)[:40]} ({len(node.args)})"
        for module in modules.values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and len(node.args) >= MANY
    ]


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_imports(modules: dict[str, Module]) -> list[str]:
    """Where a private name is taken from another module, by ``from`` or as its attribute."""
    places = []
    for module in modules.values():
        aliases: set[str] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                source = import_source(node, module)
                if source.split(".")[0] != module.name.split(".")[0]:
                    continue
                places += [
                    f"{_file(module)}:{node.lineno} {source}.{alias.name}"
                    for alias in node.names
                    if is_private(alias.name)
                ]
                aliases |= {
                    alias.asname or alias.name
                    for alias in node.names
                    if f"{source}.{alias.name}" in modules
                }
        places += [
            f"{_file(module)}:{node.lineno} {node.value.id}.{node.attr}"
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
            and is_private(node.attr)
        ]
    return places


def private_attributes(modules: dict[str, Module]) -> list[str]:
    """Where a private attribute of another file's object is reached for."""
    seen = set(private_imports(modules))
    places = []
    for module in modules.values():
        own = _own_private_names(module.tree) | NAMED_TUPLE
        foreign = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name not in modules
        }
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Attribute) or not is_private(node.attr):
                continue
            place = f"{_file(module)}:{node.lineno} {ast.unparse(node)[-60:]}"
            known = _is_self(node.value) or ast.unparse(node).split(".")[0] in foreign
            if node.attr not in own and not known and place not in seen:
                places.append(place)
    return places


def _is_self(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _own_private_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, methods, fields, and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for leaf in ast.walk(target):
                    if isinstance(leaf, ast.Name):
                        names.add(leaf.id)
                    elif isinstance(leaf, ast.Attribute) and _is_self(leaf.value):
                        names.add(leaf.attr)
    return {name for name in names if is_private(name)}


def public_names(modules: dict[str, Module]) -> list[str]:
    """Functions and classes on the top level of public modules."""
    return [
        f"{module.name}.{node.name}"
        for module in modules.values()
        if not any(is_private(part) for part in module.name.split("."))
        for node in module.tree.body
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")
    ]


def any_parameters(modules: dict[str, Module]) -> tuple[int, int, int]:
    """Parameters annotated ``Any``, those with ``Any`` in their annotation, and all: how many."""
    alone = loose = total = 0
    for module in modules.values():
        for node in ast.walk(module.tree):
            if not isinstance(node, FUNCTIONS):
                continue
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            every += [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
            every = [a for a in every if a.arg not in ("self", "cls")]
            total += len(every)
            hints = [ast.unparse(a.annotation) for a in every if a.annotation is not None]
            alone += hints.count("Any")
            loose += sum(re.search(r"\bAny\b", hint) is not None for hint in hints)
    return alone, loose, total


def docstrings(modules: dict[str, Module]) -> tuple[int, int]:
    """How many public functions, classes and methods have a docstring, and how many there are."""
    present = total = 0

    def visit(body: list[ast.stmt]) -> None:
        nonlocal present, total
        for node in body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                total += 1
                present += ast.get_docstring(node) is not None
                if isinstance(node, ast.ClassDef):
                    visit(node.body)

    for module in modules.values():
        visit(module.tree.body)
    return present, total


def read_figures(modules: dict[str, Module]) -> dict[str, Any]:
    """All that the source says."""
    by_file, by_function = files(modules), functions(modules)
    lengths = sorted(by_function.values())
    longest_file = max(by_file, key=by_file.__getitem__)
    longest = max(by_function, key=by_function.__getitem__)
    alone, loose, parameters = any_parameters(modules)
    documented, public = docstrings(modules)
    circle = circles(import_graph(modules))[0]
    top = [m for m in modules.values() if m.name.count(".") <= 1]
    return {
        "top_level_files": sum(not m.is_package or m.name.count(".") == 0 for m in top),
        "rooms": sum(m.is_package and m.name.count(".") == 1 for m in top),
        "files": len(by_file),
        "lines": sum(by_file.values()),
        "longest_file": {"name": longest_file, "lines": by_file[longest_file]},
        "files_over_300_lines": sum(lines > 300 for lines in by_file.values()),
        "functions": len(lengths),
        "longest_function": {"name": longest, "lines": by_function[longest]},
        "functions_over_60_lines": sum(lines > 60 for lines in lengths),
        "median_function_lines": statistics.median(lengths),
        "p90_function_lines": lengths[int(0.9 * (len(lengths) - 1))],
        "largest_circle": len(circle),
        "circle": circle if len(circle) > 1 else [],
        "positional_calls": len(positional_calls(modules)),
        "public_names": len(public_names(modules)),
        "private_imports": len(private_imports(modules)),
        "private_attributes": len(private_attributes(modules)),
        "parameters": parameters,
        "parameters_any_alone_share": round(alone / parameters, 4),
        "parameters_any_share": round(loose / parameters, 4),
        "public_with_docstring_share": round(documented / public, 4),
    }
