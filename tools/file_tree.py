"""The file tree in README.md, made from what each file says of itself.

A Python file's line is the first sentence of its docstring; other files' lines
stand in ``OTHER_FILES``. ``--write`` puts the tree between its marks in README.md,
without it the tree is printed.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- tree -->", "<!-- end of tree -->"
SHOWN = ("core", "plugins", "api", "cli", "benchmarks", "compatibility", "examples", "tools", "docs", ".ci")
TOP_FILES = ("Makefile", "pyproject.toml", "constraints.txt")

OTHER_FILES = {
    "Makefile": "the verbs: serve, test, check, format",
    "pyproject.toml": "tools and layers; each distribution has a pyproject of its own",
    "constraints.txt": "versions for development",
    ".ci/run": "decides whether a change lands: make check",
}


def first_sentence(path: Path) -> str:
    """What a file says of itself: a docstring's, a heading's or a leading comment's first line."""
    relative = path.relative_to(ROOT).as_posix()
    if relative in OTHER_FILES:
        return OTHER_FILES[relative]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        docstring = ast.get_docstring(ast.parse(text)) or ""
        return docstring.split("\n")[0].rstrip(".")
    if path.suffix == ".md":
        return text.split("\n")[0].lstrip("# ")
    if path.suffix in (".cpp", ".h", ".hpp"):
        return text.split("\n")[0].lstrip("/* ").rstrip(".")
    return ""


def tracked_files() -> list[Path]:
    """Files that git knows or would add, below the shown folders, sorted."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    shown = {name for name in listing if name in TOP_FILES or name.split("/")[0] in SHOWN}
    return sorted(path for path in (ROOT / name for name in shown) if path.exists())


def tree() -> str:
    """The tree as text, a line for each file, folders as headings."""
    lines: list[str] = []
    previous: tuple[str, ...] = ()
    for path in tracked_files():
        relative = path.relative_to(ROOT)
        folders = relative.parts[:-1]
        shared = 0
        while shared < min(len(folders), len(previous)) and folders[shared] == previous[shared]:
            shared += 1
        lines.extend("  " * depth + folders[depth] + "/" for depth in range(shared, len(folders)))
        previous = folders
        sentence = first_sentence(path)
        if path.name == "__init__.py":
            if sentence:
                lines[-1] = f"{lines[-1]:<42} {sentence}" if lines[-1].endswith("/") else lines[-1]
            continue
        if path.suffix in (".py", ".md", ".cpp", ".h", ".hpp") or relative.as_posix() in OTHER_FILES:
            lines.append(f"{'  ' * len(folders) + path.name:<42} {sentence}".rstrip())
    return "\n".join(lines)


def embedded(readme: str) -> str:
    """The tree as it stands in README.md."""
    inside = readme.split(BEGIN, 1)[1].split(END, 1)[0]
    return inside.strip().removeprefix("```text").removesuffix("```").strip("\n")


def main() -> int:
    """Print the tree, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tree in README.md")
    arguments = parser.parse_args()
    if not arguments.write:
        print(tree())
        return 0
    readme = README.read_text(encoding="utf-8")
    head, rest = readme.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    README.write_text(f"{head}{BEGIN}\n```text\n{tree()}\n```\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
