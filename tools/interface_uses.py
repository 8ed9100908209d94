"""What the core does with devices, programs, caches, step outputs and collectives.

Type checks the core with mypy and walks its typed syntax trees: every attribute that is asked of
something that a plugin made, every probe of such a thing (``getattr``, ``isinstance`` and the like),
and every place where one becomes ``Any``, after which nobody could tell. Also every comparison of
who a device is.

Packages outside the core are not read; what they give is ``Any`` and taken for theirs.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from interface_reading import ROOT, SOURCES
from mypy import build
from mypy.find_sources import create_source_list
from mypy.modulefinder import BuildSource
from mypy.nodes import Expression, MypyFile, Node, TypeInfo, Var
from mypy.options import Options
from mypy.types import AnyType, CallableType, Instance, ProperType, TupleType, TypeVarType, UnionType, get_proper_type

PROTOCOLS = (
    "midspan.interface.device.Device",
    "midspan.interface.device.GroupDevice",
    "midspan.interface.program.Program",
    "midspan.interface.program.StepOutput",
    "midspan.interface.cache.Cache",
    "midspan.interface.collectives.Collectives",
)
"""What plugins implement and the core calls."""

SUBJECTS = ("device", "program", "cache", "collectives")
"""Names that speak of one of those, whatever their type says."""

PROBES = ("getattr", "hasattr", "setattr", "delattr", "isinstance", "issubclass", "type", "vars", "dir", "callable")
"""Functions that ask an object what it is."""

LOOKS_INTO = ("startswith", "endswith", "find", "index", "split", "partition", "rpartition")
LOOKS_UP = ("get", "match", "fullmatch", "search")
"""Methods of a text that tell what stands in it, and functions that take one to find out."""

FOLDERS = (SOURCES, ROOT / "api/src", ROOT / "cli/src")
READERS = tuple(f"midspan.{part}." for part in ("interface", "devices", "engine", "cluster", "conformance", "runtimes"))
"""Packages of the core that know devices; the torch runtime among them has no reader but itself."""

NEEDED = ("midspan.errors", "midspan.settings", "midspan.interface", "midspan.runtimes", "midspan.runtimes.reference")

LINKS = ("node", "info", "var", "def_var", "type", "unanalyzed_type", "original_def", "expanded", "names")
"""Where a syntax tree refers to another instead of holding it."""

IDENTITY = {
    "midspan.interface.device.DeviceInfo": ("id", "description"),
    "midspan.interface.plugin.DevicePlugin": ("name", "description"),
    "midspan.interface.kernel.Placement": ("device",),
}
"""Records that say who a device is, and where."""


Span = tuple[int, int, Union[int, None], Union[int, None]]
Types = Mapping[Span, ProperType]


@dataclass(frozen=True, kw_only=True, order=True)
class Use:
    """Something that the core does with what a plugin made.

    Attributes:
        module: which.
        line: where.
        kind: ``attribute``, ``beyond`` (an attribute that the interface does not have), ``probe``,
            ``escape`` (it becomes ``Any``), ``identity`` (it matters who a device is) or
            ``name`` (and it is one that stands in the code).
        what: of what, and which.
    """

    module: str
    line: int
    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}: {self.kind}: {self.what}"


def core_sources() -> list[BuildSource]:
    """The modules of the core, the API and the command line that may know devices, and those that they need."""
    folders = [str(folder) for folder in FOLDERS]
    return [source for source in create_source_list(folders, _options()) if _is_read(source.module)]


def _is_read(module: str) -> bool:
    return not module.startswith("midspan.runtimes.torch") and (
        module.startswith(READERS) or module in NEEDED or module.split(".")[0] in ("midspan_api", "midspan_cli")
    )


def uses(sources: Iterable[BuildSource]) -> list[Use]:
    """All that these modules do with what plugins make.

    Args:
        sources: with the modules of ``midspan.interface`` among them.
    """
    sources = list(sources)
    result = build.build(sources, _options())
    protocols = {name: _type_info(result, name) for name in PROTOCOLS}
    found: list[Use] = []
    for source in sources:
        if source.module.startswith("midspan.interface"):
            continue
        text = source.text if source.text is not None else Path(str(source.path)).read_text(encoding="utf-8")
        visitor = _Visitor(source.module, _spans(result, _tree(result, source.module)), protocols)
        visitor.visit(ast.parse(text))
        found += visitor.found
    return sorted(set(found))


def _spans(result: build.BuildResult, tree: MypyFile) -> Types:
    """The types that mypy found in a module, by where the expression stands."""
    spans: dict[Span, ProperType] = {}
    seen: set[int] = set()
    waiting: list[Any] = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, Node) and not isinstance(item, (TypeInfo, Var)) and id(item) not in seen:
            seen.add(id(item))
            if isinstance(item, Expression) and item in result.types:
                span = (item.line, item.column, item.end_line, item.end_column)
                spans[span] = get_proper_type(result.types[item])
            # Nodes are compiled and have no __dict__; this lists what they hold.
            waiting += [getattr(item, name) for name in type(item).__mypyc_attrs__ if name not in LINKS]
    return spans


def _options() -> Options:
    options = Options()
    options.namespace_packages = options.explicit_package_bases = True
    options.mypy_path = [str(folder) for folder in FOLDERS]
    options.python_version = (3, 10)
    options.export_types = options.preserve_asts = options.check_untyped_defs = True
    options.incremental = False
    options.cache_dir = os.devnull
    options.follow_imports = "skip"
    options.ignore_missing_imports = options.no_site_packages = True
    return options


def _tree(result: build.BuildResult, module: str) -> MypyFile:
    tree = result.graph[module].tree
    if tree is None:
        raise ValueError(f"mypy gave no tree of {module}")
    return tree


def _type_info(result: build.BuildResult, name: str) -> TypeInfo:
    module, _, own = name.rpartition(".")
    node = result.files[module].names[own].node
    if not isinstance(node, TypeInfo):
        raise ValueError(f"{name} is no class")
    return node


class _Visitor(ast.NodeVisitor):
    """Collects uses in one module."""

    def __init__(self, module: str, types: Types, protocols: Mapping[str, TypeInfo]) -> None:
        self.found: list[Use] = []
        self._module = module
        self._types = types
        self._members = {name: _members(info) for name, info in protocols.items()}
        self._identities: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside, self._identities = self._identities, set()
        self.generic_visit(node)
        self._identities = outside

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        for item in self._items(node.value):
            if isinstance(item, Instance):
                self._attribute(node, item.type)
            elif isinstance(item, AnyType) and _speaks_of(node.value):
                self._note(node, "escape", f"{ast.unparse(node)}, and nobody knows of what type")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in PROBES and node.args:
            if self._implements(node.args[0]) or (_speaks_of(node.args[0]) and self._is_unknown(node.args[0])):
                self._note(node, "probe", ast.unparse(node))
        elif name == "cast" and ast.unparse(node.args[0]).strip("'\"") == "Any":
            if self._implements(node.args[1]):
                self._note(node, "escape", ast.unparse(node))
        elif name != "partial":  # mypy checks what it binds against the function
            if self._asks_who(node):
                self._note(node, _kind(node.args), ast.unparse(node))
            for callee in self._items(node.func):
                if isinstance(callee, CallableType):
                    self._arguments(node, callee)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if ast.unparse(node.annotation) in ("Any", "object") and node.value and self._implements(node.value):
            self._note(node, "escape", ast.unparse(node))

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if self._identity(node.value):
            self._identities |= {target.id for target in node.targets if isinstance(target, ast.Name)}

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        if any(map(self._identity, (node.left, *node.comparators))):
            self._note(node, _kind([node.left, *node.comparators]), ast.unparse(node))

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if self._identity(node.slice):
            self._note(node, "identity", ast.unparse(node))

    def visit_Match(self, node: ast.Match) -> None:
        self.generic_visit(node)
        if self._identity(node.subject) or self._implements(node.subject):
            self._note(node, "identity", f"match {ast.unparse(node.subject)}")

    def _asks_who(self, node: ast.Call) -> bool:
        """Whether a call looks into a device's name, or looks something up by it."""
        if not isinstance(node.func, ast.Attribute):
            return False
        if node.func.attr in LOOKS_INTO:
            return self._identity(node.func.value)
        return node.func.attr in LOOKS_UP and any(map(self._identity, node.args))

    def _attribute(self, node: ast.Attribute, info: TypeInfo) -> None:
        protocol = self._implemented(info)
        if protocol is None or (info.fullname != protocol and _package(info.module_name) == _package(self._module)):
            return
        kind = "attribute" if node.attr in self._members[protocol] else "beyond"
        self._note(node, kind, f"{info.name}.{node.attr}")

    def _arguments(self, node: ast.Call, callee: CallableType) -> None:
        given = list(enumerate(node.args))
        given += [(callee.arg_names.index(k.arg), k.value) for k in node.keywords if k.arg in callee.arg_names]
        for place, argument in given:
            wanted = get_proper_type(callee.arg_types[place]) if place < len(callee.arg_types) else None
            if isinstance(wanted, AnyType) and self._implements(argument):
                self._note(node, "escape", f"{ast.unparse(argument)} is passed on as Any in {ast.unparse(node)}")

    def _implemented(self, info: TypeInfo) -> str | None:
        """The protocol that a class of the core is or fulfils, if any."""
        if info.fullname in self._members:
            return info.fullname
        if not info.module_name.startswith("midspan."):
            return None
        names = _members(info)
        return next((name for name, members in self._members.items() if members <= names), None)

    def _implements(self, node: ast.expr) -> bool:
        return any(isinstance(item, Instance) and self._implemented(item.type) for item in self._items(node))

    def _is_unknown(self, node: ast.expr) -> bool:
        return any(
            isinstance(item, AnyType) or (isinstance(item, Instance) and item.type.fullname == "builtins.object")
            for item in self._items(node)
        )

    def _identity(self, node: ast.AST) -> bool:
        """Whether an expression says who a device is, or what class it has."""
        if isinstance(node, ast.Name):
            return node.id in self._identities
        if isinstance(node, ast.Attribute):
            if node.attr in ("__class__", "__module__") and self._implements(node.value):
                return True
            named = {item.type.fullname for item in self._items(node.value) if isinstance(item, Instance)}
            return any(node.attr in IDENTITY.get(name, ()) for name in named) or self._identity(node.value)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                return self._identity(node.func.value)
            name = ast.unparse(node.func)
            if name == "type" and node.args and self._implements(node.args[0]):
                return True
            return name == "str" and any(map(self._identity, node.args))
        return isinstance(node, ast.Subscript) and self._identity(node.value)

    def _items(self, node: ast.expr) -> Iterator[ProperType]:
        found = self._types.get((node.lineno, node.col_offset, node.end_lineno, node.end_col_offset))
        if found is not None:
            yield from _flat(found)

    def _note(self, node: ast.AST, kind: str, what: str) -> None:
        self.found.append(Use(module=self._module, line=getattr(node, "lineno", 0), kind=kind, what=what))


def _flat(item: ProperType) -> Iterator[ProperType]:
    if isinstance(item, UnionType):
        for part in item.items:
            yield from _flat(get_proper_type(part))
    elif isinstance(item, TypeVarType):
        yield from _flat(get_proper_type(item.upper_bound))
    elif isinstance(item, TupleType):
        yield item.partial_fallback
    else:
        yield item


def _members(info: TypeInfo) -> set[str]:
    names: set[str] = set()
    for base in info.mro:
        if base.module_name.startswith("midspan."):
            names |= {name for name in base.names if not name.startswith("_")}
    return names


def _package(module: str) -> str:
    """The part of the core that a module belongs to; each runtime is one."""
    parts = module.split(".")
    return ".".join(parts[:3] if parts[1:2] == ["runtimes"] else parts[:2])


def _kind(compared: Iterable[ast.expr]) -> str:
    """Whether one of the things that are compared is a name, or names, in the code."""
    parts = [part for item in compared for part in getattr(item, "elts", [item])]
    texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return "name" if any(letter.isalpha() for text in texts for letter in text) else "identity"


def _speaks_of(node: ast.expr) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.strip("_") in SUBJECTS


def main() -> int:
    """Print every use, and fail where one is beyond the interface."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, help="modules to read instead of the whole core")
    arguments = parser.parse_args()
    sources = core_sources()
    if arguments.paths:
        wanted = {path.resolve() for path in arguments.paths}
        sources = [
            source
            for source in sources
            if source.module.startswith("midspan.interface") or Path(source.path or ROOT).resolve() in wanted
        ]
    found = uses(sources)
    sys.stdout.write("".join(f"{use}\n" for use in found))
    return 1 if any(use.kind != "attribute" for use in found) else 0


if __name__ == "__main__":
    sys.exit(main())
