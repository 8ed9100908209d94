"""Finding plugins among installed packages; each test installs real ones into a folder on the path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from midspan.devices.discovery import DeviceCatalogue, ProbeFailed, architectures, discover, load_plugins, quantizations
from midspan.devices.interface_version import check_interface
from midspan.devices.selection import describe, select_device
from midspan.errors import DeviceNotFound, InterfaceMismatch, PluginError
from midspan.interface import DevicePlugin, Found, Unavailable
from midspan.interface.version import INTERFACE_VERSION

Install = Callable[..., None]
Source = Callable[..., str]


@pytest.fixture
def device(device_source: Source) -> Source:
    """Source of a package with one device: ``device(name, probe, interface)``."""
    return device_source


def found_failure(catalogue: DeviceCatalogue, name: str) -> str:
    return next(failure.summary() for failure in catalogue.failures if failure.name == name)


def test_the_built_in_device_is_always_there() -> None:
    catalogue = discover([])
    assert [info.id for info in catalogue.devices()] == ["reference"]
    assert catalogue.plugins["reference"].distribution == "midspan"
    assert select_device(catalogue, "reference").info.id == "reference"


def test_an_installed_package_brings_its_device(install: Install, device: Source) -> None:
    install("midspan-box", device(), version="2.5")
    discovered = discover().plugins["box"]
    assert (discovered.distribution, discovered.version) == ("midspan-box", "2.5")
    assert [info.id for info in discovered.devices()] == ["box"]


def test_a_package_that_cannot_be_imported_is_listed_with_its_traceback_and_hurts_nobody(
    install: Install, device: Source
) -> None:
    install("midspan-broken", "import a_module_that_nobody_has", version="3.1", entry="broken")
    install("midspan-box", device())
    catalogue = discover()
    failure = next(failure for failure in catalogue.failures if failure.name == "broken")
    assert (failure.distribution, failure.version) == ("midspan-broken", "3.1")
    assert isinstance(failure.error, ModuleNotFoundError)
    assert "a_module_that_nobody_has" in failure.trace
    assert "Traceback" in failure.trace
    assert {"reference", "box"} <= set(catalogue.plugins)
    assert select_device(catalogue, "auto").info.id == "box"


def test_asking_for_a_broken_plugin_by_name_is_an_error_with_its_cause(install: Install, device: Source) -> None:
    install("midspan-broken", "1 / 0", entry="broken")
    with pytest.raises(PluginError, match=r"broken.*midspan-broken 1\.0.*ZeroDivisionError") as caught:
        select_device(discover(), "broken")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "pip install" in caught.value.remedy


def test_a_plugin_of_a_newer_interface_is_refused_and_says_to_upgrade_the_core(
    install: Install, device: Source
) -> None:
    newer = (INTERFACE_VERSION[0], INTERFACE_VERSION[1] + 1)
    install("midspan-box", device(interface=newer))
    catalogue = discover()
    assert "box" not in catalogue.plugins
    assert "pip install --upgrade midspan" in found_failure(catalogue, "box")
    with pytest.raises(InterfaceMismatch):
        select_device(catalogue, "box")


@pytest.mark.parametrize(
    ("plugin", "core", "upgrade"),
    [
        ((1, 0), (2, 3), "midspan-box"),
        ((2, 4), (2, 3), "midspan"),
        ((3, 0), (2, 3), "midspan"),
        ((0, 9), (1, 0), "midspan-box"),
    ],
)
def test_a_refused_interface_names_the_side_to_upgrade(
    plugin: tuple[int, int], core: tuple[int, int], upgrade: str
) -> None:
    with pytest.raises(InterfaceMismatch) as caught:
        check_interface(stated(plugin), "midspan-box", core=core)
    assert caught.value.remedy.endswith(f"pip install --upgrade {upgrade}")
    assert f"{plugin[0]}.{plugin[1]}" in caught.value.message


@pytest.mark.parametrize("plugin", [(2, 3), (2, 0)])
def test_an_interface_that_is_not_newer_is_accepted(plugin: tuple[int, int]) -> None:
    check_interface(stated(plugin), "midspan-box", core=(2, 3))


def stated(interface: tuple[int, int]) -> DevicePlugin:
    return DevicePlugin(
        name="box", interface=interface, probe=lambda: Unavailable("none", "none"), open=lambda info, options: None
    )


def test_a_probe_that_raises_is_recorded_and_fatal_only_when_asked_for(install: Install, device: Source) -> None:
    install("midspan-box", device(probe="raise OSError('the driver hangs')"))
    catalogue = discover()
    probe = catalogue.plugins["box"].probe
    assert isinstance(probe, ProbeFailed)
    assert "the driver hangs" in probe.trace
    assert "the driver hangs" in select_device(catalogue, "auto").explanation
    with pytest.raises(PluginError, match="the driver hangs"):
        select_device(catalogue, "box")


@pytest.mark.parametrize("answer", ["return None", "return Found(())", "return [info('box')]"])
def test_a_probe_that_breaks_the_contract_is_recorded(install: Install, device: Source, answer: str) -> None:
    install("midspan-box", device(probe=answer))
    assert isinstance(discover().plugins["box"].probe, ProbeFailed)


def test_a_probe_is_asked_once(install: Install, device: Source, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    note = f"with open({str(asked)!r}, 'a') as file: file.write('x')"
    install("midspan-box", device(probe=f"{note}\n    return Found((info('box'),))"))
    catalogue = discover()
    select_device(catalogue, "auto")
    select_device(catalogue, "box")
    describe(catalogue)
    assert asked.read_text() == "x"


def test_of_two_devices_of_one_name_the_second_is_refused_naming_both(install: Install, device: Source) -> None:
    install("midspan-box", device())
    install("other-box", device())
    catalogue = discover()
    assert catalogue.plugins["box"].distribution == "midspan-box"
    assert "other-box" in found_failure(catalogue, "box")
    assert "midspan-box" in found_failure(catalogue, "box")


def test_nobody_takes_the_name_of_the_built_in_device(install: Install, device: Source) -> None:
    install("midspan-box", device(name="reference"))
    catalogue = discover()
    assert catalogue.plugins["reference"].distribution == "midspan"
    assert "already taken" in found_failure(catalogue, "reference")


def test_a_hook_that_returns_no_devices_breaks_the_contract(install: Install) -> None:
    install("midspan-box", "from midspan.interface import hookimpl\n@hookimpl\ndef midspan_devices(): return 'box'")
    assert "must return a list of DevicePlugin" in found_failure(discover(), "midspan-box")


def test_a_hook_that_the_core_does_not_know_is_refused(install: Install) -> None:
    install("midspan-box", "from midspan.interface import hookimpl\n@hookimpl\ndef midspan_dreams(): return []")
    catalogue = discover()
    assert "midspan_dreams" in found_failure(catalogue, "midspan-box")
    assert [plugin.name for plugin in catalogue.registry.installed if plugin.name == "midspan-box"] == []


def test_auto_takes_the_highest_preference_and_says_over_what(install: Install, device: Source) -> None:
    install("midspan-slow", device("slow", "return Found((info('slow', 5),))"))
    install("midspan-fast", device("fast", "return Found((info('fast:0', 90), info('fast:1', 80)))"))
    install("midspan-gone", device("gone", "return Unavailable('no box is plugged in.', 'Plug it in.')"))
    selected = select_device(discover(), "auto")
    assert selected.info.id == "fast:0"
    for word in ("90", "fast:1 (80)", "slow (5)", "reference (0)", "gone: no box is plugged in"):
        assert word in selected.explanation


def test_a_device_is_asked_for_by_name_or_name_and_index(install: Install, device: Source) -> None:
    install("midspan-fast", device("fast", "return Found((info('fast:0'), info('fast:1')))"))
    catalogue = discover()
    assert select_device(catalogue, "fast").info.id == "fast:0"
    assert select_device(catalogue, "fast:1").info.id == "fast:1"
    assert select_device(catalogue, "reference:0").info.id == "reference"
    for wrong in ("fast:2", "fast:", "fast:one", "fast:-1", "fast:²"):
        with pytest.raises(DeviceNotFound, match="fast:0"):
            select_device(catalogue, wrong)


def test_an_unknown_device_lists_what_exists_and_why_the_others_do_not(install: Install, device: Source) -> None:
    install("midspan-gone", device("gone", "return Unavailable('no box is plugged in', 'Plug it in.')"))
    install("midspan-broken", "1 / 0", entry="broken")
    with pytest.raises(DeviceNotFound) as caught:
        select_device(discover(), "warp")
    for word in ("'warp'", "reference", "gone: no box is plugged in", "broken", "ZeroDivisionError"):
        assert word in str(caught.value)
    with pytest.raises(DeviceNotFound, match="no box is plugged in") as caught:
        select_device(discover(), "gone")
    assert caught.value.remedy == "Plug it in."


@pytest.mark.parametrize(
    ("asked", "meant"), [("turbo", "fast:turbo"), ("fsat:turbo", "fast:turbo"), ("referense", "reference")]
)
def test_a_device_that_was_nearly_named_is_suggested(asked: str, meant: str, install: Install, device: Source) -> None:
    install("midspan-fast", device("fast", "return Found((info('fast:turbo'), info('fast:eco')))"))
    with pytest.raises(DeviceNotFound) as caught:
        select_device(discover(), asked)
    assert meant in caught.value.remedy


TABLES = pytest.mark.parametrize(
    ("hook", "read", "what"),
    [
        ("midspan_architectures", architectures, "architecture"),
        ("midspan_quantizations", quantizations, "quantization"),
    ],
)


def table_source(hook: str, body: str) -> str:
    return f"from midspan.interface import hookimpl\n@hookimpl\ndef {hook}(): {body}"


@TABLES
def test_packages_bring_entries_by_name_and_of_two_with_one_name_the_first_is_taken(
    install: Install, hook: str, read: Callable[..., object], what: str
) -> None:
    install("midspan-one", table_source(hook, "return {'Dream': print}"))
    assert read(load_plugins()) == {"Dream": print}
    install("midspan-two", table_source(hook, "return {'Dream': max}"))
    assert read(load_plugins()) == {"Dream": print}
    refused = found_failure(discover(), "midspan-two")
    assert f"The {what} 'Dream' of midspan-two is already brought by midspan-one" in refused


@TABLES
@pytest.mark.parametrize(
    "body", ["1 / 0", "raise SystemExit(3)", "return None", "return {'Dream': 5}", "return {7: print}"]
)
def test_a_broken_hook_of_a_table_is_listed_and_hurts_nobody(
    install: Install, hook: str, read: Callable[..., object], what: str, body: str
) -> None:
    install("midspan-bad", table_source(hook, body))
    install("midspan-good", table_source(hook, "return {'Good': print}"))
    assert read(load_plugins()) == {"Good": print}
    assert "midspan-bad" in found_failure(discover(), "midspan-bad")


def test_the_reference_probe_finds_a_device_with_memory() -> None:
    probe = discover([]).plugins["reference"].probe
    assert isinstance(probe, Found)
    assert probe.devices[0].memory_bytes > 0
    assert probe.devices[0].preference == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, midspan; loaded = set(sys.modules); midspan.__dir__(); "
        "heavy = {'numpy', 'msgspec', 'torch', 'tokenizers', 'jinja2', 'pluggy', 'asyncio'} & loaded; "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_every_public_name_can_be_had() -> None:
    import midspan

    for name in midspan.__all__:
        assert getattr(midspan, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = midspan.Nothing  # type: ignore[attr-defined]
