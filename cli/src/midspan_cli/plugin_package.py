"""Writes the package of a new device plugin from the templates beside this module.

Knows files and names, no device and no terminal. A template's path and text are the
package's own, but for ``_module_`` in the path, a leading ``dot.`` and the words
between ``@`` signs.

Invariant: a folder that holds something is never written to.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from midspan.errors import SettingsError

TEMPLATES = Path(__file__).parent / "plugin_template"
SUFFIX = ".template"
RESERVED = ("auto", "reference")
"""Names that ``--device`` knows without any plugin."""

NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
PACKAGE = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class PluginPackage:
    """What to write.

    Attributes:
        name: the device's, as after ``--device``.
        package: the distribution's, as pip names it.
        interface: version of the device interface that the package is written against.
        core: oldest release of the core that it takes, ``"0.1"``.
    """

    name: str
    package: str
    interface: tuple[int, int]
    core: str

    @property
    def module(self) -> str:
        """The name under which the package is imported."""
        return self.package.replace("-", "_")

    def files(self) -> dict[str, str]:
        """Path inside the package -> content."""
        words = {
            "name": self.name,
            "package": self.package,
            "module": self.module,
            "interface": str(self.interface),
            "core": self.core,
        }
        paths = sorted(path for path in TEMPLATES.rglob("*" + SUFFIX) if path.is_file())
        return {
            _target(path.relative_to(TEMPLATES), self.module): _filled(path.read_text(encoding="utf-8"), words)
            for path in paths
        }

    def write(self, folder: Path) -> tuple[str, ...]:
        """Write every file.

        Args:
            folder: new, or empty.

        Returns:
            The files' paths inside the folder.

        Raises:
            SettingsError: the folder holds something, or cannot be written.
        """
        files = self.files()
        try:
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise SettingsError(
                    f"'{folder}' exists already, and nothing in it is overwritten.",
                    remedy="Name a new folder with --folder, or move the old one away.",
                )
            for path, content in files.items():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(content, encoding="utf-8")
        except OSError as error:
            raise SettingsError(
                f"The package could not be written to '{folder}': {error}.", remedy="Name another folder with --folder."
            ) from error
        return tuple(files)


def check_name(name: str, taken: Collection[str]) -> None:
    """Refuse a device name that could not be used.

    Args:
        name: as typed.
        taken: names of the plugins that are installed.

    Raises:
        SettingsError: with what is wrong and what to take instead.
    """
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise SettingsError(
            f"'{name}' cannot be a device's name.",
            remedy="Take lower case letters, digits and underscores, a letter first, 32 at most: my_chip.",
        )
    if name in RESERVED or name in taken:
        owner = "Midspan itself" if name in RESERVED else "an installed plugin"
        raise SettingsError(
            f"The device name '{name}' is taken by {owner}.",
            remedy="Take another name; 'midspan devices' and 'midspan plugins' list those in use.",
        )


def check_package(package: str, module: str) -> None:
    """Refuse a package name that pip would not take, or whose module is there already.

    Args:
        package: as typed.
        module: the name under which it would be imported.

    Raises:
        SettingsError: with what is wrong and what to take instead.
    """
    if not PACKAGE.fullmatch(package) or keyword.iskeyword(module):
        raise SettingsError(
            f"'{package}' cannot be the package's name.",
            remedy="Take lower case letters, digits and single hyphens, a letter first: midspan-mychip.",
        )
    if find_spec(module) is not None:
        raise SettingsError(
            f"A package '{module}' is installed already.", remedy="Take another name, or uninstall the old package."
        )


def _target(path: Path, module: str) -> str:
    parts = ["." + part[4:] if part.startswith("dot.") else part for part in path.parts]
    return "/".join(parts).removesuffix(SUFFIX).replace("_module_", module)


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([a-z]+)@", lambda match: words[match[1]], text)
