"""What the code may say and import: held against its syntax trees."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HARDWARE = re.compile(
    r"(?<![a-z])(cuda|rocm|hip|xpu|tpu|npu|hpu|nvidia|amd|intel|gaudi|ascend|trainium|metal|vulkan)(?![a-z])"
)
HEAVY = ("torch", "jax", "transformers", "fastapi", "typer")


def python_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def words_of(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier and string of a syntax tree, docstrings included, with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "arg", "name", "module"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield line, value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield line, node.value


@pytest.mark.parametrize("folder", ["core/src", "api/src", "cli/src"])
def test_core_api_and_cli_name_no_hardware_and_no_vendor(folder: str) -> None:
    found = []
    for path in python_files(folder):
        for line, word in words_of(ast.parse(path.read_text(encoding="utf-8"))):
            for part in re.split(r"[^A-Za-z]+", word):
                if HARDWARE.fullmatch(part.lower()):
                    found.append(f"{path.relative_to(ROOT)}:{line}: {part}")
    assert not found, "\n".join(found)


def test_the_check_for_hardware_names_sees_identifiers_strings_and_docstrings() -> None:
    source = 'def use_cuda():\n    """Runs on a TPU."""\n    return "xpu:0"\n'
    parts = [p for _, word in words_of(ast.parse(source)) for p in re.split(r"[^A-Za-z]+", word)]
    assert [p for p in parts if HARDWARE.fullmatch(p.lower())] == ["cuda", "TPU", "xpu"]


def test_every_module_of_the_core_but_the_torch_runtime_imports_without_heavy_packages() -> None:
    names = []
    for path in python_files("core/src/midspan"):
        parts = path.relative_to(ROOT / "core/src").with_suffix("").parts
        if "torch" in parts:
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    assert len(names) > 40
    program = (
        "import sys, importlib\n"
        f"blocked = {HEAVY!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked:\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_pickles_or_evaluates_what_it_is_sent() -> None:
    found = []
    for path in python_files("core/src", "api/src", "cli/src", "plugins/cpu/src"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                if any(name.split(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve") for name in names):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "eval":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: eval")
    assert not found, "\n".join(found)


def test_every_module_and_every_public_function_says_what_it_is_for() -> None:
    missing = []
    for path in python_files("core/src", "api/src", "cli/src", "plugins/cpu/src"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            missing.append(f"{path.relative_to(ROOT)}: module")
        for node in tree.body:
            named = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not missing, "\n".join(missing)


def test_files_are_named_for_what_they_own() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "types", "base"}
    named = [path for path in python_files("core", "plugins", "api", "cli", "tests", "tools") if path.stem in vague]
    assert not named
