"""The device interface as its sources state it: names, fields, signatures, docstrings.

Reads syntax trees and imports nothing but the table of operations, so what it finds is
what a person finds in the file. For the page and for the snapshot of the interface.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "core/src"

INTERFACE = (
    "midspan.interface.version",
    "midspan.interface.plugin",
    "midspan.interface.device",
    "midspan.interface.capabilities",
    "midspan.interface.program",
    "midspan.interface.cache",
    "midspan.interface.collectives",
    "midspan.interface.batch",
    "midspan.interface.graph",
    "midspan.interface.weights",
    "midspan.interface.kernel",
    "midspan.interface.operations",
    "midspan.interface.hooks",
)
"""Every module of the contract."""

RUNTIMES = (
    ("midspan.runtimes.reference.device", "ReferenceDevice"),
    ("midspan.runtimes.reference.array_library", "ArrayLibrary"),
    ("midspan.runtimes.reference.array_library", "HOST_ARRAYS"),
    ("midspan.runtimes.reference.cache", "ReferenceCache"),
    ("midspan.runtimes.reference.kernels", "KERNELS"),
    ("midspan.runtimes.reference.sampling", "sample"),
    ("midspan.runtimes.torch.program", "TorchRuntime"),
)
"""What a plugin may stand on beside the contract."""

ERRORS = (
    "MidspanError",
    "SettingsError",
    "CheckpointError",
    "GraphError",
    "UnsupportedOperation",
    "OutOfDeviceMemory",
    "DeviceLost",
)
"""What a device raises, or sees."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """An annotated name in a class.

    Attributes:
        name, type: as written.
        default: its source; None: it must be given.
        doc: what the class's docstring, or a string below the field, says of it.
    """

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True, kw_only=True)
class Method:
    """A function.

    Attributes:
        name: its name.
        signature: arguments and result, as written, without ``self``.
        doc: its docstring.
    """

    name: str
    signature: str
    doc: str


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One public name.

    Attributes:
        name: the name.
        module: where it is written.
        kind: ``record`` (a dataclass), ``protocol``, ``class``, ``function`` or ``value``.
        signature: of a function; the source of a value; a class's bases.
        doc: the docstring, or the string that follows a value.
        fields, methods: of a class.
        flags: how a dataclass is declared.
    """

    name: str
    module: str
    kind: str
    signature: str
    doc: str
    fields: tuple[Field, ...] = ()
    methods: tuple[Method, ...] = ()
    flags: tuple[str, ...] = field(default=())


def module_tree(module: str) -> ast.Module:
    """The syntax tree of a module of the core."""
    return ast.parse((SOURCES / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def module_doc(module: str) -> str:
    """What a module says of itself."""
    return ast.get_docstring(module_tree(module)) or ""


def entries(module: str) -> Iterator[Entry]:
    """The public names that a module defines, in order."""
    yield from tree_entries(module_tree(module), module)


def entry(module: str, name: str) -> Entry:
    """One name of a module."""
    return next(found for found in entries(module) if found.name == name)


def tree_entries(tree: ast.Module, module: str) -> Iterator[Entry]:
    """The public names of a syntax tree, in order."""
    for node, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield _class_entry(node, module)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield Entry(
                name=node.name,
                module=module,
                kind="function",
                signature=_signature(node),
                doc=ast.get_docstring(node) or "",
                flags=tuple(ast.unparse(decorator) for decorator in node.decorator_list),
            )
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name) and not target.id.startswith("_"):
                value = ast.unparse(node.value)
                yield Entry(name=target.id, module=module, kind="value", signature=value, doc=_string(following))


def _class_entry(node: ast.ClassDef, module: str) -> Entry:
    bases = tuple(ast.unparse(base) for base in node.bases)
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    record = next((text for text in decorators if text.startswith("dataclass")), None)
    doc, described = split_section(ast.get_docstring(node) or "", "Attributes")
    kind = "protocol" if "Protocol" in bases else "record" if record else "class"
    fields = _fields(node, described)
    methods = [_method(item) for item in node.body if isinstance(item, ast.FunctionDef) and _public(item.name)]
    return Entry(
        name=node.name,
        module=module,
        kind=kind,
        signature=", ".join(bases),
        doc=doc,
        fields=fields if kind != "class" or not any(item.name == "__init__" for item in methods) else (),
        methods=tuple(methods),
        flags=tuple(sorted(name for name in ("frozen", "kw_only") if record and f"{name}=True" in record)),
    )


def _fields(node: ast.ClassDef, described: dict[str, str]) -> tuple[Field, ...]:
    fields = []
    for item, following in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id
            default = None if item.value is None else ast.unparse(item.value)
            doc = described.get(name) or _string(following)
            fields.append(Field(name=name, type=ast.unparse(item.annotation), default=default, doc=doc))
    return tuple(fields)


def _public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def _method(node: ast.FunctionDef) -> Method:
    return Method(name=node.name, signature=_signature(node), doc=ast.get_docstring(node) or "")


def _signature(node: ast.FunctionDef) -> str:
    arguments = ast.unparse(node.args)
    inner = arguments.removeprefix("self").removeprefix(", ")
    returns = "None" if node.returns is None else ast.unparse(node.returns)
    return f"({inner}) -> {returns}"


def _string(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return "\n".join(line.strip() for line in node.value.value.strip().splitlines())
    return ""


def split_section(doc: str, title: str) -> tuple[str, dict[str, str]]:
    """A docstring without one of its sections, and the section's items: name -> text.

    Args:
        doc: cleaned of indentation.
        title: ``Attributes``, ``Args``, ``Raises`` or ``Returns`` (one nameless item).
    """
    kept: list[str] = []
    items: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line == f"{title}:":
            inside = True
        elif not inside or (line and not line.startswith(" ")):
            inside = False
            kept.append(line)
        elif line.startswith("     ") or title == "Returns":
            for name in names or [""]:
                items[name] = f"{items.get(name, '')} {line.strip()}".strip()
        elif line.strip():
            label, _, text = line.strip().partition(":")
            names = [part.strip() for part in label.replace(" and ", ", ").split(",")]
            items.update({name.strip("`").split(" ")[0]: text.strip() for name in names})
            names = [name.strip("`").split(" ")[0] for name in names]
    return "\n".join(kept).strip(), items
