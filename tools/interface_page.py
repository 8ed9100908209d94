"""docs/device-interface.md, made from the docstrings of the contract.

The order of the page and the text between its sections stand here; everything that is said
of a name stands beside that name in the code. ``--write`` replaces the page, without it the
page is printed.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from interface_reading import ERRORS, ROOT, RUNTIMES, Entry, entries, entry, module_doc, module_tree, split_section

import midspan.interface
from midspan.interface.operations import OPERATIONS, REQUIRED
from midspan.interface.version import INTERFACE_VERSION

PAGE = ROOT / "docs/device-interface.md"
CONTRACT = "midspan.interface"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        module: whose docstring opens it; None: none does.
        names: module -> names shown, in order; empty: all of the module.
    """

    title: str
    module: str | None
    names: Mapping[str, tuple[str, ...]]


SECTIONS = (
    Section(
        title="The plugin and its probe",
        module=f"{CONTRACT}.plugin",
        names={f"{CONTRACT}.plugin": ("DevicePlugin", "Found", "Unavailable"), f"{CONTRACT}.device": ("DeviceInfo",)},
    ),
    Section(title="What a device claims", module=f"{CONTRACT}.capabilities", names={f"{CONTRACT}.capabilities": ()}),
    Section(
        title="The device",
        module=f"{CONTRACT}.device",
        names={f"{CONTRACT}.device": ("Device", "Bounds", "MemoryReport")},
    ),
    Section(
        title="The program and what a step returns",
        module=f"{CONTRACT}.program",
        names={f"{CONTRACT}.program": ("Program", "StepOutput", "StepResult", "Logprobs", "FinishedStep")},
    ),
    Section(
        title="The cache",
        module=f"{CONTRACT}.cache",
        names={
            f"{CONTRACT}.cache": (
                "Cache",
                "CacheLayout",
                "CacheGroup",
                "block_bytes",
                "packed_block_bytes",
                "PADDING_BLOCK",
                "CACHE_ELEMENT_BYTES",
                "CACHE_SCALE_BYTES",
            )
        },
    ),
    Section(
        title="Several devices in one model",
        module=f"{CONTRACT}.collectives",
        names={f"{CONTRACT}.device": ("GroupDevice",), f"{CONTRACT}.collectives": ()},
    ),
    Section(
        title="The batch",
        module=f"{CONTRACT}.batch",
        names={f"{CONTRACT}.batch": ("Batch", "SamplingBatch", "Adjustments", "graph_input_names")},
    ),
    Section(
        title="The graph",
        module=f"{CONTRACT}.graph",
        names={f"{CONTRACT}.graph": ("Graph", "Node", "Value", "Weight", "Dim", "Attribute", "ACTIVATION")},
    ),
    Section(title="Weights", module=f"{CONTRACT}.weights", names={f"{CONTRACT}.weights": ()}),
    Section(title="Kernels and their choice", module=f"{CONTRACT}.kernel", names={f"{CONTRACT}.kernel": ()}),
)

INTRODUCTION = """\
# The device interface, version {version}

<!-- Made by `make pages` from the docstrings in core/src/midspan/interface. Change them, not this page. -->

This is the whole contract between Midspan and a kind of hardware. Everything here is imported from
`midspan.interface` unless a line says otherwise; it loads numpy and nothing heavier. How to write a device is told
in words elsewhere; this page is for looking things up.

Ten concepts, in the order in which they come into play:

| concept | what it is for |
|---|---|
{concepts}

The core calls a device, a program, a cache and collectives by what stands on this page and by nothing else, and it
never asks who they are; both are held by tests.
"""

CONCEPTS = (
    ("DevicePlugin", "plugin"),
    ("Found", "plugin"),
    ("DeviceInfo", "device"),
    ("Capabilities", "capabilities"),
    ("Device", "device"),
    ("Program", "program"),
    ("StepOutput", "program"),
    ("Cache", "cache"),
    ("MemoryReport", "device"),
    ("Collectives", "collectives"),
)

OPERATIONS_TEXT = """\
An input is a value of the graph, a weight comes from the checkpoint, an attribute stands in the node. An attribute
without a value here must be given by whoever builds the graph; a node carries all of them, defaults included.
Weights and inputs marked with `?` may be absent."""

RUNTIMES_TEXT = """\
A device may implement everything above by itself. It may also stand on a runtime that ships with the core, and
bring only what it has: a table of kernels, an array library, a cache. These names belong to the contract as well
and follow the same rule of versions."""

ERRORS_TEXT = """\
All are in `midspan.errors`, and all take a `remedy`: a full sentence that says what the reader can do. Any other
exception of a plugin is reported with its traceback, and fails only the request whose step raised it."""

HOOKS_TEXT = """\
An installed package names a module in the entry-point group `{group}`; the module implements hooks, marked with
`midspan.interface.hookimpl`. [hooks.md](hooks.md) has an example of each."""

VERSION_TEXT = """\
{doc}

This core speaks {major}.{minor}. A plugin states its version in `DevicePlugin.interface`; a literal, because
`INTERFACE_VERSION` would state whatever core is installed.

| the plugin's version, beside the core's | |
|---|---|
| same major, same or older minor | loads |
| same major, newer minor | refused: upgrade the core |
| older major | refused: upgrade the plugin |
| newer major | refused: upgrade the core |

Within a major nothing is removed, renamed or given another type, no default changes, and whatever is added is
optional: a field with a default, a new class, a new operation, a new hook, an argument with a default of something
that the core provides. A method is never added to a class that plugins implement, nor an argument to one of its
methods. `tests/architecture` holds every change of the contract against the snapshot of each minor of this major, and
the plugins in `compatibility/`, each built against one minor and left as it was, are installed and run by the tests."""


def page() -> str:
    """The page's whole text."""
    parts = [INTRODUCTION.format(version=_version(), concepts="\n".join(_concepts()))]
    for section in SECTIONS:
        parts += [f"## {section.title}", _prose(module_doc(section.module) if section.module else "")]
        for module, names in section.names.items():
            found = {item.name: item for item in entries(module)}
            parts += [_shown(found[name]) for name in names or found]
    parts += ["## Operations", _prose(module_doc(f"{CONTRACT}.operations")), OPERATIONS_TEXT, _operations()]
    parts += ["## Runtimes that ship with the core", RUNTIMES_TEXT]
    parts += [_shown(entry(module, name), f"`{module}.{name}`") for module, name in RUNTIMES]
    parts += ["## Errors", ERRORS_TEXT, _errors(), "## Hooks", HOOKS_TEXT.format(group=_group()), _hooks()]
    major, minor = INTERFACE_VERSION
    text = VERSION_TEXT.format(doc=_prose(module_doc(f"{CONTRACT}.version")), major=major, minor=minor)
    parts += ["## Versions", text]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _version() -> str:
    return ".".join(map(str, INTERFACE_VERSION))


def _concepts() -> Iterator[str]:
    for name, module in CONCEPTS:
        found = entry(f"{CONTRACT}.{module}", name)
        shown = "`Found`, `Unavailable`" if name == "Found" else f"[`{name}`](#{name.lower()})"
        yield f"| {shown} | {_line(found.doc.split(chr(10) * 2)[0])} |"


def _shown(item: Entry, where: str = "") -> str:
    """A name's part of the page."""
    if not where and item.name not in midspan.interface.__all__:
        where = f"`{item.module}.{item.name}`"
    parts = [f"### {item.name}", where and f"From {where}."]
    if item.kind == "value":
        known = re.fullmatch(r"[A-Z_]\w*\(.*|.*\bfor\b.*", item.signature, re.S)
        parts.append(_prose(item.doc) if known else f"`{item.signature}`\n\n{_prose(item.doc)}")
    elif item.kind == "function":
        parts += [_code(f"def {item.name}{item.signature}"), _documented(item.doc)]
    else:
        bases = [base for base in item.signature.split(", ") if base not in ("", "Protocol")]
        parts.append(f"Adds to `{'`, `'.join(bases)}`." if bases else "")
        parts.append(_documented(item.doc))
        parts.append(_fields(item))
        parts += [_method(item, method.name, method.signature, method.doc) for method in item.methods]
    return "\n\n".join(part for part in parts if part)


def _fields(item: Entry) -> str:
    if not item.fields:
        return ""
    rows = [
        (f"`{field.name}`", f"`{field.type}`", _default(field.default, item.kind), field.doc) for field in item.fields
    ]
    heads = ("field", "type", "default", "")
    if item.kind == "protocol":
        return _table((heads[0], heads[1], heads[3]), [(name, type_, doc) for name, type_, _, doc in rows])
    return _table(heads, rows)


def _default(source: str | None, kind: str) -> str:
    if source is None:
        return ""
    factory = re.search(r"default_factory=(\w+)", source)
    explicit = re.search(r"default=(.+)\)$", source) if source.startswith("field(") else None
    if factory:
        return {"dict": "`{}`"}.get(factory.group(1), f"`{factory.group(1)}()`")
    return f"`{explicit.group(1)}`" if explicit else f"`{source}`"


def _method(item: Entry, name: str, signature: str, doc: str) -> str:
    shown = item.name if name == "__init__" else name
    head = f"{shown}{signature.removesuffix(' -> None') if name == '__init__' else signature}"
    return "\n\n".join(part for part in (_code(head), _documented(doc)) if part)


def _code(text: str) -> str:
    """A signature, one argument a line where it is long."""
    if len(text) > 100:
        head, _, rest = text.partition("(")
        inner, _, tail = rest.rpartition(")")
        call = ast.parse(f"def f({inner}): ...").body[0]
        assert isinstance(call, ast.FunctionDef)
        text = f"{head}(\n    " + ",\n    ".join(_arguments(call.args)) + f",\n){tail}"
    return f"```python\n{text}\n```"


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    first = len(arguments.args) - len(arguments.defaults)
    for place, argument in enumerate(arguments.args):
        default = arguments.defaults[place - first] if place >= first else None
        yield ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")
    if arguments.kwonlyargs:
        yield "*"
    for argument, keyword in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield ast.unparse(argument) + (f" = {ast.unparse(keyword)}" if keyword else "")


def _documented(doc: str) -> str:
    """A docstring: its prose, then arguments, result and errors as a list."""
    text, arguments = split_section(doc, "Args")
    text, returns = split_section(text, "Returns")
    text, raises = split_section(text, "Raises")
    text, attributes = split_section(text, "Attributes")
    lines = [f"- `{name}`: {_line(said)}" for name, said in (*arguments.items(), *attributes.items())]
    lines += [f"- returns: {_line(said)}" for said in returns.values()]
    lines += [f"- raises `{name}`: {_line(said)}" for name, said in raises.items()]
    return "\n\n".join(part for part in (_prose(text), "\n".join(lines)) if part)


def _operations() -> str:
    rows = []
    for name, operation in OPERATIONS.items():
        weights = [*operation.weights, *(f"{role}?" for role in operation.optional_weights)]
        attributes = [
            f"`{key}`" if default == REQUIRED else f"`{key}={default!r}`"
            for key, default in operation.attributes.items()
        ]
        doc = f"{operation.doc} A device may refuse it." if operation.refusable else operation.doc
        rows.append((f"`{name}`", " ".join(operation.inputs), " ".join(weights), " ".join(attributes), doc))
    return _table(("operation", "inputs", "weights", "attributes", "what it computes"), rows)


def _errors() -> str:
    found = {item.name: item for item in entries("midspan.errors")}
    rows = []
    for name in ERRORS:
        (init,) = [method for method in found[name].methods if method.name == "__init__"] or [None]
        rows.append((f"`{name}{_call(init.signature) if init else ''}`", found[name].signature, found[name].doc))
    return _table(("error", "is a", "when"), rows)


def _call(signature: str) -> str:
    return signature.removesuffix(" -> None")


def _hooks() -> str:
    hooks = [item for item in entries(f"{CONTRACT}.hooks") if item.kind == "function"]
    return _table(("hook", ""), [(f"`{item.name}{item.signature}`", item.doc) for item in hooks])


def _group() -> str:
    source = module_tree(f"{CONTRACT}.hooks")
    values = {item.targets[0].id: item.value for item in source.body if isinstance(item, ast.Assign)}  # type: ignore[attr-defined]
    return str(ast.literal_eval(values["ENTRY_POINT_GROUP"]))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join(_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _prose(text: str) -> str:
    return text.replace("``", "`").strip()


def _line(text: str) -> str:
    return " ".join(_prose(text).split())


def main() -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {PAGE.relative_to(ROOT)}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
