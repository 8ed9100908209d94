"""What an opened device, its programs and caches must be like, and who is named when they are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import LLM
from midspan.devices.contract import CLAIM_RULES, check_device
from midspan.devices.discovery import DeviceCatalogue, DiscoveredDevice, load_plugins
from midspan.errors import MidspanError, PluginError
from midspan.interface import Capabilities, DeviceInfo, DevicePlugin, Found, MemoryReport, Placement
from midspan.interface.version import INTERFACE_VERSION
from midspan.runtimes.reference import ReferenceDevice

INFO = DeviceInfo(id="box:0", description="a box", memory_bytes=2**30)
Change = Callable[[Any], None]


class NoAttribute:
    """Stands where nothing should: reading it is an AttributeError."""

    def __get__(self, owner: object, kind: type) -> Any:
        raise AttributeError("nothing here")


def without(name: str) -> Change:
    """The object's class loses an attribute."""

    def change(target: Any) -> None:
        target.__dict__.pop(name, None)
        target.__class__ = type("Lesser", (type(target),), {name: NoAttribute()})

    return change


def with_value(name: str, value: Any) -> Change:
    return lambda target: setattr(target, name, value)


def claiming(**claims: Any) -> Change:
    return with_value("capabilities", dataclasses.replace(Capabilities(), **claims))


def plugin_of(device: Any) -> DevicePlugin:
    return DevicePlugin(
        name="box", interface=INTERFACE_VERSION, probe=lambda: Found((INFO,)), open=lambda info, options: device
    )


DEVICE_FAULTS: dict[str, tuple[Change, str]] = {
    **{
        f"no {name}": (without(name), f"has no method '{name}'")
        for name in ("compile", "allocate_cache", "block_bytes", "memory", "synchronize", "close")
    },
    "no info": (without("info"), "has no attribute 'info'"),
    "no capabilities": (without("capabilities"), "has no attribute 'capabilities'"),
    "a method that is none": (with_value("memory", MemoryReport), "'memory' that does not take 0 arguments"),
    "a method of two arguments": (with_value("compile", lambda graph, weights: None), "does not take 3 arguments"),
    "a group without a way to join it": (
        lambda device: (claiming(max_world_size=2)(device), without("join")(device)),  # type: ignore[func-returns-value]
        "has no method 'join'",
    ),
    "info of another kind": (with_value("info", "box:0"), "Device.info is 'box:0'"),
    "info of another device": (
        with_value("info", dataclasses.replace(INFO, id="box:1")),
        "'box:1' although 'box:0' was opened",
    ),
    "claims in a mapping": (with_value("capabilities", {"dtypes": ("float32",)}), "Device.capabilities is"),
    "no dtype": (claiming(dtypes=()), "Capabilities.dtypes is empty"),
    "no cache dtype": (claiming(cache_dtypes=()), "Capabilities.cache_dtypes is empty"),
    "no block size": (claiming(block_sizes=()), "Capabilities.block_sizes is empty"),
    "an unknown dtype": (claiming(dtypes=("float32", "float7")), "Capabilities.dtypes names 'float7'"),
    "dtypes in one text": (claiming(dtypes="float32"), "Capabilities.dtypes is 'float32'"),
    "a list of dtypes": (claiming(dtypes=["float32"]), "a tuple of texts"),
    "a block of no tokens": (claiming(block_sizes=(16, 0)), "a tuple of positive integers"),
    "half a block": (claiming(block_sizes=(0.5,)), "a tuple of positive integers"),
    "no tokens in a step": (claiming(max_tokens=0), "Capabilities.max_tokens is 0"),
    "a negative limit": (claiming(max_context=-1), "Capabilities.max_context is -1"),
    "a limit in words": (claiming(max_requests="many"), "Capabilities.max_requests is 'many'"),
    "negative logprobs": (claiming(max_logprobs=-1), "Capabilities.max_logprobs is -1"),
    "no device in a group": (claiming(max_world_size=0), "Capabilities.max_world_size is 0"),
    "a flag that is a number": (claiming(deterministic=1), "Capabilities.deterministic is 1"),
}


@pytest.mark.parametrize(("change", "told"), DEVICE_FAULTS.values(), ids=DEVICE_FAULTS)
def test_a_device_that_breaks_the_interface_is_refused_by_name(change: Change, told: str) -> None:
    device = ReferenceDevice(INFO)
    plugin = plugin_of(device)
    check_device(device, plugin, found=INFO)
    change(device)
    with pytest.raises(PluginError) as caught:
        check_device(device, plugin, found=INFO)
    assert caught.value.plugin == "box"
    assert told in caught.value.message
    assert caught.value.remedy


def test_a_cache_type_that_nobody_knows_is_a_devices_own_affair() -> None:
    device = ReferenceDevice(INFO, capabilities=Capabilities(cache_dtypes=("float8_own",), block_sizes=(24, 7)))
    check_device(device, plugin_of(device), found=INFO)


def test_there_is_a_rule_for_each_claim() -> None:
    assert {str(field.type) for field in dataclasses.fields(Capabilities)} == set(CLAIM_RULES)


def on_result(method: str, change: Change) -> Change:
    """What a method of the device returns is changed."""

    def change_device(device: Any) -> None:
        original = getattr(device, method)

        def changed(*given: Any) -> Any:
            result = original(*given)
            change(result)
            return result

        setattr(device, method, changed)

    return change_device


def returning(method: str, value: Any) -> Change:
    return lambda device: setattr(device, method, lambda *given: value)


def later(change: Change) -> Change:
    """The device is changed when it has compiled."""

    def change_device(device: Any) -> None:
        compiles = device.compile

        def compiled(*given: Any) -> Any:
            program = compiles(*given)
            change(device)
            return program

        device.compile = compiled

    return change_device


def raising(*given: Any) -> Any:
    raise KeyError("lost")


LOADING_FAULTS: dict[str, tuple[Change, str]] = {
    "no program": (returning("compile", None), "the program that Device.compile returned has no attribute 'placement'"),
    "a program that cannot run": (on_result("compile", without("run")), "has no method 'run'"),
    "a program that cannot evaluate": (on_result("compile", without("evaluate")), "has no method 'evaluate'"),
    "a placement of another kind": (on_result("compile", with_value("placement", [])), "Program.placement is []"),
    "a placement of texts": (
        on_result("compile", with_value("placement", Placement(device="box", nodes=("a",)))),  # type: ignore[arg-type]
        "tuple of NodePlacement",
    ),
    "a program of half a byte": (
        on_result("compile", with_value("memory_bytes", lambda: 0.5)),
        "memory_bytes() is 0.5",
    ),
    "a compiler that raises": (with_value("compile", raising), "failed while the graph was compiled: KeyError: 'lost'"),
    "no cache": (returning("allocate_cache", None), "the cache that Device.allocate_cache returned has no attribute"),
    "a cache that cannot copy": (on_result("allocate_cache", without("copy")), "has no method 'copy'"),
    "a cache of too few blocks": (
        on_result("allocate_cache", with_value("blocks", (1,))),
        "Cache.blocks is (1,); it must be",
    ),
    "a cache of another layout": (on_result("allocate_cache", with_value("layout", None)), "Cache.layout is None"),
    "a cache that raises": (with_value("allocate_cache", raising), "failed while the cache was allocated: KeyError"),
    "one size for all groups": (returning("block_bytes", 4096), "Device.block_bytes() returned 4096"),
    "blocks of no bytes": (returning("block_bytes", (0,)), "a size of Device.block_bytes() is 0"),
    "memory in words": (later(returning("memory", "plenty")), "Device.memory() returned 'plenty'"),
    "negative memory": (
        later(returning("memory", MemoryReport(total_bytes=1, free_bytes=-1, used_bytes=0))),
        "MemoryReport.free_bytes is -1",
    ),
    "a first step that raises": (
        on_result("compile", with_value("run", lambda batch, cache: raising())),
        "failed while the first step ran: KeyError",
    ),
    "a first step without a result": (
        on_result("compile", with_value("run", lambda batch, cache: None)),
        "broke the interface: Program.run returned None",
    ),
}


@pytest.fixture
def load(tiny_model: Path) -> Callable[[Any], LLM]:
    """The tiny model on a device that is given."""

    def make(device: Any) -> LLM:
        plugin = plugin_of(device)
        found = DiscoveredDevice(plugin=plugin, distribution="midspan-box", version="1", probe=Found((INFO,)))
        catalogue = DeviceCatalogue(plugins={"box": found}, failures=(), registry=load_plugins([]))
        return LLM(str(tiny_model), catalogue=catalogue, kv_cache_memory_bytes=2**20)

    return make


@pytest.mark.parametrize(("change", "told"), LOADING_FAULTS.values(), ids=LOADING_FAULTS)
def test_what_a_device_makes_is_held_against_the_interface_while_a_model_is_loaded(
    load: Callable[[Any], LLM], change: Change, told: str
) -> None:
    device = ReferenceDevice(INFO)
    change(device)
    with pytest.raises(PluginError) as caught:
        load(device)
    assert caught.value.plugin == "box"
    assert told in caught.value.message
    assert caught.value.remedy


def test_a_device_that_is_refused_when_opened_is_closed(load: Callable[[Any], LLM]) -> None:
    closed: list[bool] = []
    device = ReferenceDevice(INFO, capabilities=Capabilities(block_sizes=()))
    device.close = lambda: closed.append(True)  # type: ignore[method-assign]
    with pytest.raises(PluginError, match="block_sizes is empty"):
        load(device)
    assert closed == [True]


def test_an_error_of_midspans_own_passes_unchanged(load: Callable[[Any], LLM]) -> None:
    device = ReferenceDevice(dataclasses.replace(INFO, memory_bytes=10), capabilities=Capabilities())
    with pytest.raises(MidspanError) as caught:
        load(device)
    assert caught.value.code == "out_of_device_memory"
