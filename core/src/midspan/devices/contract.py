"""Whether what a plugin brings keeps to the interface, and who is named when it does not.

Knows the interface and no hardware: it looks at records, attributes and signatures,
and runs nothing but the calls whose answers it is given. Every breach is a
``PluginError`` that names the plugin, the attribute at fault and what to do.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Union
from unicodedata import category

from midspan.errors import MidspanError, PluginError
from midspan.interface.cache import Cache, CacheLayout
from midspan.interface.capabilities import Capabilities
from midspan.interface.device import Device, DeviceInfo, GroupDevice, MemoryReport
from midspan.interface.kernel import NodePlacement, Placement
from midspan.interface.plugin import DevicePlugin, Found, Unavailable
from midspan.interface.program import Program
from midspan.runtimes.reference.element_types import ELEMENT_TYPES

AUTO = "auto"
"""The one word after ``--device`` that no plugin may take."""

NAME = re.compile(r"[a-z][a-z0-9_-]*")
ID = re.compile(r"\S+")
STEERING = ("Cc", "Cs", "Zl", "Zp")
"""Unicode's categories of control characters, halves of characters, and separators of lines and paragraphs."""
REQUIRED_CLAIMS = ("dtypes", "cache_dtypes", "block_sizes")


def check_plugin(plugin: DevicePlugin) -> None:
    """Hold a plugin's record against the interface; its version is ``interface_version``'s matter.

    Raises:
        PluginError: the name, a function or the description is not what it must be.
    """
    name = plugin.name
    if not isinstance(name, str) or not NAME.fullmatch(name) or name == AUTO:
        raise _breach(
            str(name),
            f"DevicePlugin.name is {name!r}",
            f"a name is a lower-case word of letters, digits, '-' and '_', and not '{AUTO}'",
        )
    for attribute in ("probe", "open"):
        if not callable(getattr(plugin, attribute)):
            raise _breach(name, f"DevicePlugin.{attribute} is {getattr(plugin, attribute)!r}", "it must be a function")
    if not isinstance(plugin.description, str):
        raise _breach(name, f"DevicePlugin.description is {plugin.description!r}", "it must be a text")
    _check_printable(name, "DevicePlugin.description", plugin.description)


def check_probe_answer(plugin: DevicePlugin, answer: object) -> Union[Found, Unavailable]:
    """Hold a probe's answer against the interface.

    Returns:
        The answer.

    Raises:
        PluginError: it is no probe result, or a device in it is badly described.
    """
    if isinstance(answer, Unavailable):
        for attribute in ("reason", "remedy"):
            if not _is_text(getattr(answer, attribute)):
                found = f"its probe returned Unavailable with {attribute}={getattr(answer, attribute)!r}"
                raise _breach(plugin.name, found, "people read it, so it must be a text that is not empty")
            _check_printable(plugin.name, f"Unavailable.{attribute}", getattr(answer, attribute), lines=True)
        return answer
    if not isinstance(answer, Found) or not isinstance(answer.devices, tuple) or not answer.devices:
        wanted = "it must be Found with a tuple of at least one DeviceInfo, or Unavailable"
        raise _breach(plugin.name, f"its probe returned {answer!r}", wanted)
    seen: set[str] = set()
    for info in answer.devices:
        _check_info(plugin.name, info)
        if info.id in seen:
            raise _breach(plugin.name, f"its probe found two devices with the id '{info.id}'", "ids must differ")
        seen.add(info.id)
    return answer


def check_device(device: Device, plugin: DevicePlugin, *, found: DeviceInfo | None = None) -> None:
    """Hold an opened device against the interface.

    Args:
        device: what ``plugin.open`` returned.
        plugin: whose it is.
        found: what the probe said of it; None where that is not known.

    Raises:
        PluginError: an attribute or a claim that breaks the interface.
    """
    name = plugin.name
    _check_members(name, "its device", device, Device)
    if not isinstance(device.info, DeviceInfo):
        raise _breach(name, f"Device.info is {device.info!r}", "it must be the DeviceInfo that open was given")
    _check_info(name, device.info)
    if found is not None and device.info.id != found.id:
        raise _breach(
            name,
            f"Device.info.id is '{device.info.id}' although '{found.id}' was opened",
            "the device must carry the DeviceInfo that open was given",
        )
    _check_claims(name, device.capabilities)
    if device.capabilities.max_world_size > 1:
        _check_members(name, "its device, which claims max_world_size above 1,", device, GroupDevice)


def check_program(program: Program, plugin: DevicePlugin) -> None:
    """Hold what ``Device.compile`` returned against the interface.

    Raises:
        PluginError: an attribute that is missing or wrong.
    """
    _check_members(plugin.name, "the program that Device.compile returned", program, Program)
    placement = program.placement
    if not isinstance(placement, Placement):
        raise _breach(plugin.name, f"Program.placement is {placement!r}", "it must be a Placement")
    if not isinstance(placement.nodes, tuple) or not all(isinstance(node, NodePlacement) for node in placement.nodes):
        raise _breach(plugin.name, "Placement.nodes holds something else", "it must be a tuple of NodePlacement")
    _check_count(plugin.name, "Program.memory_bytes()", program.memory_bytes(), least=0)


def check_cache(cache: Cache, plugin: DevicePlugin, layout: CacheLayout, blocks: tuple[int, ...]) -> None:
    """Hold what ``Device.allocate_cache`` returned against the interface and against what was asked for.

    Args:
        cache: what it returned.
        plugin: whose it is.
        layout: as asked for.
        blocks: as asked for.

    Raises:
        PluginError: an attribute that is missing or wrong.
    """
    _check_members(plugin.name, "the cache that Device.allocate_cache returned", cache, Cache)
    if cache.layout != layout:
        raise _breach(plugin.name, f"Cache.layout is {cache.layout!r}", "it must be the layout that was asked for")
    if cache.blocks != blocks:
        raise _breach(plugin.name, f"Cache.blocks is {cache.blocks!r}", f"it must be {blocks!r}, as asked for")
    _check_count(plugin.name, "Cache.memory_bytes()", cache.memory_bytes(), least=0)


def check_block_bytes(sizes: Sequence[int], plugin: DevicePlugin, layout: CacheLayout) -> tuple[int, ...]:
    """Hold an answer of ``Device.block_bytes`` against the layout that it is for.

    Returns:
        The sizes.

    Raises:
        PluginError: it is not one positive number for each group.
    """
    if not isinstance(sizes, tuple) or len(sizes) != len(layout.groups):
        wanted = f"it must be a tuple of {len(layout.groups)}, one for each cache group"
        raise _breach(plugin.name, f"Device.block_bytes() returned {sizes!r}", wanted)
    for size in sizes:
        _check_count(plugin.name, "a size of Device.block_bytes()", size, least=1)
    return sizes


def check_memory(report: MemoryReport, plugin: DevicePlugin) -> MemoryReport:
    """Hold an answer of ``Device.memory`` against the interface.

    Returns:
        The report.

    Raises:
        PluginError: it is no report, or a number in it is negative or none.
    """
    if not isinstance(report, MemoryReport):
        raise _breach(plugin.name, f"Device.memory() returned {report!r}", "it must be a MemoryReport")
    for field in fields(report):
        _check_count(plugin.name, f"MemoryReport.{field.name}", getattr(report, field.name), least=0)
    return report


@contextmanager
def plugin_at_fault(plugin: DevicePlugin, distribution: str, doing: str) -> Iterator[None]:
    """Turn what a plugin raises against the interface into an error that names the plugin.

    Errors of Midspan's own pass as they are, and so does the person's interruption.

    Args:
        plugin: whose code runs in the context.
        distribution: its package, as pip names it.
        doing: what it was asked to do, to complete "while ...".

    Raises:
        PluginError: in place of any other exception, which is its cause.
    """
    try:
        yield
    except (MidspanError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(
            f"The plugin '{plugin.name}' of {distribution} failed while {doing}: {error_text(error)}.",
            plugin=plugin.name,
            remedy=own_error_remedy(distribution),
        ) from error


def own_error_remedy(distribution: str) -> str:
    """What to do about an error of a plugin's own, whose text stands before this.

    Args:
        distribution: the plugin's package, as pip names it.
    """
    return f"Its own message is above; if that does not help: pip install --upgrade {distribution}, or ask its makers."


def error_text(error: BaseException) -> str:
    """An exception in one line, whatever its own text does."""
    try:
        text = str(error).strip()
    except Exception:
        text = "its message cannot be shown"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_info(plugin: str, info: object) -> None:
    if not isinstance(info, DeviceInfo):
        raise _breach(plugin, f"its probe found {info!r}", "it must be a DeviceInfo")
    if not isinstance(info.id, str) or not ID.fullmatch(info.id):
        raise _breach(plugin, f"DeviceInfo.id is {info.id!r}", "it must be a text without spaces")
    if info.id != plugin and not (info.id.startswith(f"{plugin}:") and len(info.id) > len(plugin) + 1):
        raise _breach(plugin, f"DeviceInfo.id is '{info.id}'", f"it must be '{plugin}', or begin with '{plugin}:'")
    if not _is_text(info.description):
        raise _breach(plugin, f"DeviceInfo.description is {info.description!r}", "it must be a text")
    _check_printable(plugin, "DeviceInfo.id", info.id)
    _check_printable(plugin, "DeviceInfo.description", info.description)
    _check_count(plugin, "DeviceInfo.memory_bytes", info.memory_bytes, least=1)
    if not _is_integer(info.preference):
        raise _breach(plugin, f"DeviceInfo.preference is {info.preference!r}", "it must be an integer")


def _check_claims(plugin: str, claims: object) -> None:
    if not isinstance(claims, Capabilities):
        raise _breach(plugin, f"Device.capabilities is {claims!r}", "it must be a Capabilities")
    for field in fields(Capabilities):
        value, (fits, wanted) = getattr(claims, field.name), CLAIM_RULES[str(field.type)]
        if not fits(value):
            raise _breach(plugin, f"Capabilities.{field.name} is {value!r}", f"it must be {wanted}")
        if field.name in REQUIRED_CLAIMS and not value:
            raise _breach(plugin, f"Capabilities.{field.name} is empty", "it must name at least one")
    unknown = [dtype for dtype in claims.dtypes if dtype not in ELEMENT_TYPES]
    if unknown:
        known = ", ".join(ELEMENT_TYPES)
        raise _breach(plugin, f"Capabilities.dtypes names {unknown[0]!r}", f"activation types are {known}")
    _check_count(plugin, "Capabilities.max_world_size", claims.max_world_size, least=1)


def _check_members(plugin: str, what: str, given: object, protocol: type) -> None:
    for name in _attributes(protocol):
        try:
            getattr(given, name)
        except Exception as error:
            reason = "" if isinstance(error, AttributeError) else f" ({error_text(error)})"
            raise _breach(
                plugin, f"{what} has no attribute '{name}'{reason}", f"see midspan.interface.{protocol.__name__}"
            ) from None
    for name, wanted in _methods(protocol).items():
        method = getattr(given, name, None)
        if not callable(method):
            raise _breach(plugin, f"{what} has no method '{name}'", f"see midspan.interface.{protocol.__name__}.{name}")
        count = len(inspect.signature(wanted).parameters) - 1
        if not _takes(method, count):
            raise _breach(
                plugin,
                f"{what} has a method '{name}' that does not take {count} arguments",
                f"see midspan.interface.{protocol.__name__}.{name}",
            )


def _attributes(protocol: type) -> list[str]:
    names = dict.fromkeys(name for part in protocol.__mro__ for name in inspect.get_annotations(part))
    return [name for name in names if not name.startswith("_")]


def _methods(protocol: type) -> Mapping[str, Callable[..., Any]]:
    return {
        name: member
        for part in reversed(protocol.__mro__)
        for name, member in vars(part).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def _takes(method: Callable[..., Any], count: int) -> bool:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return True  # Written in another language; a call will show.
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _check_count(plugin: str, what: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _breach(plugin, f"{what} is {value!r}", f"it must be an integer of {least} or more")


def _check_printable(plugin: str, what: str, text: str, *, lines: bool = False) -> None:
    """No character may steer a terminal, and only where several lines are shown may one begin another."""
    steering = [letter for letter in text if category(letter) in STEERING and not (lines and letter == "\n")]
    if steering:
        wanted = "it is shown as it is, so it may hold no control characters" + ("" if lines else " or line breaks")
        raise _breach(plugin, f"{what} is {text!r}", wanted)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


CLAIM_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "tuple[str, ...]": (lambda value: isinstance(value, tuple) and all(map(_is_text, value)), "a tuple of texts"),
    "tuple[int, ...]": (
        lambda value: isinstance(value, tuple) and all(map(_is_size, value)),
        "a tuple of positive integers",
    ),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "int": (lambda value: _is_integer(value) and value >= 0, "an integer of 0 or more"),
    "int | None": (lambda value: value is None or _is_size(value), "a positive integer, or None for no limit"),
}
"""What a claim must be, by the type that ``Capabilities`` states for it."""


def _breach(plugin: str, what: str, wanted: str) -> PluginError:
    return PluginError(
        f"The plugin '{plugin}' breaks the device interface: {what}; {wanted}.",
        plugin=plugin,
        remedy="Correct it in the plugin; if it is not yours, upgrade it or report this to its makers "
        "('midspan plugins' names its package).",
    )
