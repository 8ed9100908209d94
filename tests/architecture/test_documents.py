"""The documents tell the truth about the tree."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import midspan
import midspan.interface
from midspan.interface import hooks

ROOT = Path(__file__).resolve().parents[2]


def load_file_tree() -> ModuleType:
    spec = importlib.util.spec_from_file_location("file_tree", ROOT / "tools/file_tree.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["file_tree"] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_shows_the_file_tree_as_it_is() -> None:
    file_tree = load_file_tree()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert file_tree.embedded(readme) == file_tree.tree(), "run: make tree"


def test_every_link_between_documents_leads_somewhere() -> None:
    broken = []
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", path.read_text(encoding="utf-8")):
            if not (path.parent / target).exists():
                broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert not broken, "\n".join(broken)


def test_every_hook_is_documented() -> None:
    names = [name for name in vars(hooks) if name.startswith("midspan_")]
    assert len(names) >= 3
    text = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    assert [name for name in names if f"## {name}" not in text] == []


def test_every_public_name_exists_and_is_documented() -> None:
    for module in (midspan, midspan.interface):
        for name in module.__all__:
            assert getattr(module, name) is not None
    text = (ROOT / "docs/python-api.md").read_text(encoding="utf-8")
    assert [name for name in midspan.__all__ if f"`{name}" not in text] == []
