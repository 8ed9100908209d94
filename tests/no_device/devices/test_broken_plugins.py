"""Broken plugins of every kind: each is listed with its cause, disturbs nobody, and is fatal only when asked for."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan.devices.discovery import ProbeFailed, discover
from midspan.devices.selection import open_selected, select_device
from midspan.errors import DeviceNotFound, InterfaceMismatch, PluginError, SettingsError
from midspan.interface.version import INTERFACE_VERSION

Install = Callable[..., None]
Source = Callable[..., str]

MAJOR, MINOR = INTERFACE_VERSION
HOOK = "from midspan.interface import *\n@hookimpl\ndef midspan_devices(): {body}"
PLUGIN = "DevicePlugin(name={name}, interface=(0, 9), probe={probe}, open={open})"


def hook(body: str) -> str:
    return HOOK.format(body=body)


def offered(name: str = "'bad'", *, probe: str = "print", opens: str = "print") -> str:
    return hook(f"return [{PLUGIN.format(name=name, probe=probe, open=opens)}]")


LOADING = {
    "a missing module": ("import a_module_that_nobody_has", "a_module_that_nobody_has"),
    "a name that the core does not have": ("from midspan.interface import Dream", "Dream"),
    "a syntax error": ("def broken(:", "SyntaxError"),
    "exit at import": ("import sys\nsys.exit('bye')", "SystemExit: bye"),
    "another base exception at import": ("class Odd(BaseException): pass\nraise Odd('gone')", "Odd: gone"),
    "an error without a text": (
        "class Mute(Exception):\n    def __str__(self): raise ValueError\nraise Mute",
        "Mute: its message cannot be shown",
    ),
    "no hook": ("x = 1", "implements no hook"),
    "an unknown hook": (hook("pass").replace("midspan_devices", "midspan_dreams"), "midspan_dreams"),
    "a hook with other arguments": (hook("pass").replace("()", "(machine)"), "midspan_devices"),
    "an exception in the hook": (hook("1 / 0"), "ZeroDivisionError"),
    "exit in the hook": (hook("raise SystemExit(3)"), "SystemExit: 3"),
    "nothing from the hook": (hook("return None"), "must return a list of DevicePlugin, not None"),
    "nonsense from the hook": (hook("return 'box'"), "must return a list of DevicePlugin, not 'box'"),
    "nonsense in the list": (hook("return [7]"), "must return a list of DevicePlugin, not 7"),
    "a record with an unknown field": (hook("return [DevicePlugin(name='bad', dreams=1)]"), "dreams"),
    "the name auto": (offered("'auto'"), "DevicePlugin.name is 'auto'"),
    "a name in upper case": (offered("'Bad'"), "DevicePlugin.name is 'Bad'"),
    "a name with a colon": (offered("'bad:0'"), "DevicePlugin.name is 'bad:0'"),
    "an empty name": (offered("''"), "DevicePlugin.name is ''"),
    "a name that is no text": (offered("7"), "DevicePlugin.name is 7"),
    "no name": (offered("None"), "DevicePlugin.name is None"),
    "no function to probe": (offered(probe="None"), "DevicePlugin.probe is None"),
    "no function to open": (offered(opens="'later'"), "DevicePlugin.open is 'later'"),
    "a version in words": (offered().replace("(0, 9)", "'0.9'"), "interface version '0.9'"),
    "a version that is negative": (offered().replace("(0, 9)", "(0, -1)"), "interface version"),
}


@pytest.mark.parametrize(("source", "told"), LOADING.values(), ids=LOADING)
def test_a_plugin_that_cannot_be_loaded(install: Install, device_source: Source, source: str, told: str) -> None:
    install("midspan-bad", source, version="3.1", entry="bad")
    install("midspan-box", device_source())
    catalogue = discover()
    (failure,) = catalogue.failures
    assert (failure.distribution, failure.version, failure.entry_point) == ("midspan-bad", "3.1", "bad")
    assert told in failure.summary()
    assert type(failure.error).__name__ in failure.trace
    assert select_device(catalogue, "auto").info.id == "box"
    assert told in select_device(catalogue, "auto").explanation
    with pytest.raises(PluginError) as caught:
        select_device(catalogue, "bad")
    assert told in str(caught.value)
    assert caught.value.remedy


PROBES = {
    "an exception": ("raise OSError('no driver')", "OSError: no driver"),
    "exit": ("raise SystemExit(1)", "SystemExit: 1"),
    "another base exception": ("raise GeneratorExit", "GeneratorExit"),
    "nothing": ("return None", "its probe returned None"),
    "a list of devices": ("return [info('box')]", "it must be Found"),
    "no device": ("return Found(())", "at least one DeviceInfo"),
    "a list in Found": ("return Found([info('box')])", "tuple of at least one DeviceInfo"),
    "something else in Found": ("return Found(('box',))", "its probe found 'box'"),
    "two of one id": ("return Found((info('box'), info('box')))", "two devices with the id 'box'"),
    "another plugin's id": ("return Found((info('cpu'),))", "must be 'box', or begin with 'box:'"),
    "an id that only begins like the name": ("return Found((info('boxer'),))", "must be 'box', or begin with"),
    "an id without its number": ("return Found((info('box:'),))", "DeviceInfo.id is 'box:'"),
    "an id with a space": ("return Found((info('box: 1'),))", "without spaces"),
    "an id that is no text": ("return Found((info(0),))", "DeviceInfo.id is 0"),
    "memory in words": ("return Found((info('box', memory_bytes='8G'),))", "DeviceInfo.memory_bytes is '8G'"),
    "memory as a fraction": ("return Found((info('box', memory_bytes=1.5),))", "memory_bytes is 1.5"),
    "no memory": ("return Found((info('box', memory_bytes=0),))", "an integer of 1 or more"),
    "no description": ("return Found((info('box', description=''),))", "DeviceInfo.description is ''"),
    "lines in a description": (r"return Found((info('box', description='a\nbox'),))", "no control characters"),
    "escape codes in a description": (r"return Found((info('box', description='\x1b[31ma'),))", r"is '\x1b[31ma'"),
    "escape codes in a reason": (r"return Unavailable('\x1b[2J', 'Plug it in.')", "no control characters"),
    "a preference in words": ("return Found((info('box', 'high'),))", "DeviceInfo.preference is 'high'"),
    "no reason": ("return Unavailable('', 'Plug it in.')", "reason=''"),
    "a remedy that is no text": ("return Unavailable('gone', None)", "remedy=None"),
}


@pytest.mark.parametrize(("probe", "told"), PROBES.values(), ids=PROBES)
def test_a_probe_that_fails(install: Install, device_source: Source, probe: str, told: str) -> None:
    install("midspan-box", device_source(probe=probe))
    catalogue = discover()
    answer = catalogue.plugins["box"].probe
    assert isinstance(answer, ProbeFailed)
    assert "Traceback" in answer.trace
    chosen = select_device(catalogue, "auto")
    assert chosen.plugin.name != "box"
    assert told in chosen.explanation
    with pytest.raises(PluginError) as caught:
        select_device(catalogue, "box")
    assert told in str(caught.value)
    assert "midspan-box" in str(caught.value)


def test_a_probe_that_hangs_is_given_up_and_all_others_are_heard(install: Install, device_source: Source) -> None:
    release = threading.Event()
    wait = "import sys; sys.modules['hanging_probe_release'].wait(60); return Found((info('box'),))"
    sys.modules["hanging_probe_release"] = release  # type: ignore[assignment]
    try:
        install("midspan-box", device_source(probe=wait))
        install("midspan-good", device_source("good", "return Found((info('good', 5),))"))
        catalogue = discover(probe_deadline=0.05)
    finally:
        release.set()
        del sys.modules["hanging_probe_release"]
    found = catalogue.plugins["box"]
    assert isinstance(found.probe, ProbeFailed)
    assert found.probe_seconds == 0.05
    assert "midspan_box_module.py" in found.probe.trace
    assert select_device(catalogue, "good").info.id == "good"
    with pytest.raises(PluginError, match=r"did not answer within 0\.05 s"):
        select_device(catalogue, "box")


def test_probes_run_at_the_same_time(install: Install, device_source: Source) -> None:
    """Each waits for the other, so that one after the other they would never end."""
    sys.modules["meeting_point"] = threading.Barrier(2)  # type: ignore[assignment]
    try:
        for name in ("one", "two"):
            meet = f"import sys; sys.modules['meeting_point'].wait(60); return Found((info({name!r}),))"
            install(f"midspan-{name}", device_source(name, meet))
        catalogue = discover(probe_deadline=60)
    finally:
        del sys.modules["meeting_point"]
    assert {"one", "two"} <= {info.id for info in catalogue.devices()}


def test_a_slow_probe_is_used_and_people_are_told(install: Install, device_source: Source) -> None:
    slow = (
        "import time\n    begun = time.perf_counter()\n    while time.perf_counter() - begun < 0.11: pass\n"
        "    return Found((info('box'),))"
    )
    install("midspan-box", device_source(probe=slow))
    catalogue = discover()
    found = catalogue.plugins["box"]
    assert select_device(catalogue, "box").info.id == "box"
    assert found.probe_seconds > 0.1
    (warning,) = found.warnings()
    assert "'box' took" in warning


@pytest.mark.parametrize("interface", [(MAJOR, MINOR + 1), (MAJOR + 1, 0)])
def test_a_newer_interface_is_refused_with_its_version(
    install: Install, device_source: Source, interface: tuple[int, int]
) -> None:
    install("midspan-box", device_source(interface=interface))
    catalogue = discover()
    (failure,) = catalogue.failures
    with pytest.raises(InterfaceMismatch) as caught:
        select_device(catalogue, "box")
    assert caught.value is failure.error
    assert "pip install --upgrade midspan" in caught.value.remedy
    assert failure.interface == f"{interface[0]}.{interface[1]}"


def test_of_two_plugins_with_one_name_the_first_package_wins_and_the_choice_says_so(
    install: Install, device_source: Source
) -> None:
    install("zeta-box", device_source())
    install("alpha-box", device_source())
    catalogue = discover()
    assert catalogue.plugins["box"].distribution == "alpha-box"
    chosen = select_device(catalogue, "box")
    assert chosen.distribution == "alpha-box"
    assert "Not taken" in chosen.explanation
    for name in ("alpha-box", "zeta-box"):
        assert name in chosen.explanation
    with pytest.raises(PluginError, match=r"zeta-box is already taken by alpha-box"):
        select_device(catalogue, "zeta-box")


BROKEN_PROBE = "raise OSError('no driver')"


def test_of_two_plugins_with_one_name_a_broken_one_gives_way(install: Install, device_source: Source) -> None:
    install("alpha-box", device_source(probe=BROKEN_PROBE))
    install("zeta-box", device_source())
    catalogue = discover()
    chosen = select_device(catalogue, "box")
    assert chosen.distribution == "zeta-box"
    (failure,) = catalogue.failures
    assert "of alpha-box is already taken by zeta-box; its own probe failed: OSError: no driver" in failure.summary()
    assert failure.remedy() == "Uninstall one of them: pip uninstall alpha-box, or pip uninstall zeta-box"


def test_nobody_takes_the_built_in_name_whatever_probes_say(install: Install, device_source: Source) -> None:
    install("alpha-box", device_source("reference", "return Found((info('reference', 99),))"))
    catalogue = discover()
    assert catalogue.plugins["reference"].distribution == "midspan"
    assert [failure.remedy() for failure in catalogue.failures] == ["Uninstall one of them: pip uninstall alpha-box"]


def test_a_package_that_lists_one_name_twice_hears_it(install: Install, device_source: Source) -> None:
    install("alpha-box", device_source().replace("return [", "return 2 * ["))
    catalogue = discover()
    assert catalogue.plugins["box"].distribution == "alpha-box"
    (failure,) = catalogue.failures
    assert "alpha-box lists the device name 'box' more than once" in failure.summary()
    assert "pip uninstall" not in failure.remedy()


def test_of_two_entry_points_with_one_name_both_packages_are_named(install: Install, device_source: Source) -> None:
    install("alpha-box", device_source("alpha", "return Found((info('alpha'),))"), entry="box")
    install("zeta-box", device_source("zeta", "return Found((info('zeta'),))"), entry="box")
    catalogue = discover()
    assert "alpha" in catalogue.plugins
    assert "zeta" not in catalogue.plugins
    (failure,) = catalogue.failures
    assert "of zeta-box is already taken by alpha-box" in failure.summary()


def test_one_bad_device_in_a_list_leaves_its_siblings(install: Install) -> None:
    good = "DevicePlugin(name='good', interface=(0, 9), probe=lambda: Unavailable('none', 'none'), open=print)"
    install("midspan-bad", hook(f"return [7, {good}]"), entry="bad")
    catalogue = discover()
    assert catalogue.plugins["good"].entry_point == "bad"
    assert [failure.name for failure in catalogue.failures] == ["bad"]


def test_a_person_may_interrupt_and_reads_what_was_going_on(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("midspan-bad", "raise KeyboardInterrupt", entry="bad")
    with pytest.raises(KeyboardInterrupt):
        discover()
    assert capsys.readouterr().err == "Interrupted while importing the plugin 'bad' of midspan-bad\n"


class WaitingListener(io.StringIO):
    """A standard error that lets go of what hangs once it hears for whom a person waits."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()

    def write(self, text: str) -> int:
        if "Still" in text:
            self.heard.set()
        return super().write(text)


HANG = "import sys\nif not sys.stderr.heard.wait(60): raise TimeoutError('nobody said a word')"


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("", "importing the plugin 'bad' of midspan-bad"),
        ("hook", "asking the plugin 'bad' of midspan-bad for its devices"),
    ],
    ids=["an import", "a hook"],
)
def test_a_long_wait_is_told_with_the_way_out(
    install: Install, device_source: Source, monkeypatch: pytest.MonkeyPatch, where: str, told: str
) -> None:
    start = "def midspan_devices():\n    "
    indented = HANG.replace("\n", "\n    ")
    source = device_source()
    source = source.replace(start, f"{start}{indented}\n    ") if where == "hook" else f"{HANG}\n{source}"
    install("midspan-bad", source, entry="bad")
    listener = WaitingListener()
    monkeypatch.setattr("sys.stderr", listener)
    catalogue = discover(patience=0.01)
    assert not catalogue.failures
    assert f"Still {told}" in listener.getvalue()
    assert "to go on without it: MIDSPAN_SKIP_PLUGINS=bad, or pip uninstall midspan-bad\n" in listener.getvalue()


def test_a_plugin_that_a_person_left_out_is_not_imported(
    install: Install, device_source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("midspan-bad", "raise AssertionError('it was imported')", entry="bad")
    install("midspan-box", device_source(), entry="box")
    monkeypatch.setenv("MIDSPAN_SKIP_PLUGINS", "other, bad")
    catalogue = discover()
    assert not catalogue.failures
    assert [owner.distribution for owner in catalogue.registry.skipped] == ["midspan-bad"]
    assert "bad (midspan-bad): left out by MIDSPAN_SKIP_PLUGINS" in select_device(catalogue, "auto").explanation
    assert select_device(catalogue, "box").info.id == "box"
    with pytest.raises(DeviceNotFound, match="left out by MIDSPAN_SKIP_PLUGINS") as caught:
        select_device(catalogue, "bad")
    assert caught.value.remedy == "Take 'bad' out of MIDSPAN_SKIP_PLUGINS."


def test_what_plugins_print_goes_to_standard_error(
    install: Install, device_source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    source = device_source(probe="print('from the probe'); return Found((info('box'),))")
    source = source.replace("    return [", "    print('from the hook')\n    return [")
    install("midspan-box", f"print('from the import')\n{source}")
    assert select_device(discover(), "box").info.id == "box"
    captured = capsys.readouterr()
    assert captured.out == ""
    for where in ("import", "hook", "probe"):
        assert f"from the {where}\n" in captured.err


def test_the_remedy_for_an_error_of_the_plugins_own_is_its_message(install: Install, device_source: Source) -> None:
    install("midspan-bad", "import a_module_that_nobody_has", entry="bad")
    install("midspan-box", device_source(probe=BROKEN_PROBE))
    for name, package in (("bad", "midspan-bad"), ("box", "midspan-box")):
        with pytest.raises(PluginError) as caught:
            select_device(discover(), name)
        assert caught.value.remedy.startswith("Its own message is above; if that does not help: ")
        assert package in caught.value.remedy


def test_equal_preferences_are_decided_by_a_rule_that_is_said(install: Install, device_source: Source) -> None:
    install("zeta-one", device_source("one", "return Found((info('one', 9999),))"))
    install("alpha-two", device_source("two", "return Found((info('two', 9999),))"))
    chosen = select_device(discover(), "auto")
    assert chosen.info.id == "two"
    assert "one (9999)" in chosen.explanation
    assert "Of equal preference what ships with Midspan comes first, then packages by name" in chosen.explanation


OPENING = {
    "an exception": ("1 / 0", "ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit(5)", "SystemExit: 5"),
    "nothing": ("return None", "has no attribute 'info'"),
}


@pytest.mark.parametrize(("body", "told"), OPENING.values(), ids=OPENING)
def test_a_device_that_does_not_open_is_the_plugins_fault(
    install: Install, device_source: Source, body: str, told: str
) -> None:
    source = device_source().replace("lambda info, options: None", "open_box")
    install("midspan-box", f"{source}\ndef open_box(info, options):\n    {body}")
    with pytest.raises(PluginError) as caught:
        open_selected(select_device(discover(), "box"), {})
    assert told in caught.value.message
    assert caught.value.plugin == "box"


def test_what_a_plugin_says_itself_passes_as_it_is(install: Install, device_source: Source) -> None:
    source = device_source().replace("lambda info, options: None", "open_box")
    refusal = "from midspan.errors import SettingsError\n    raise SettingsError('no option dream')"
    install("midspan-box", f"{source}\ndef open_box(info, options):\n    {refusal}")
    with pytest.raises(SettingsError, match="no option dream"):
        open_selected(select_device(discover(), "box"), {})


def test_a_number_that_no_device_has_is_not_another_ones_place(install: Install, device_source: Source) -> None:
    install("midspan-box", device_source(probe="return Found((info('box:4'), info('box:7')))"))
    catalogue = discover()
    assert select_device(catalogue, "box:7").info.id == "box:7"
    assert "the first of 2" in select_device(catalogue, "box").explanation
    with pytest.raises(DeviceNotFound):
        select_device(catalogue, "box:1")


def test_a_device_below_zero_is_taken_only_by_name(install: Install, device_source: Source) -> None:
    probe = "return Found((info('box:a', -5), info('box:b', -5)))"
    install("midspan-box", device_source(probe=probe))
    catalogue = discover()
    chosen = select_device(catalogue, "auto")
    assert chosen.plugin.name != "box"
    assert "only when asked for by name: box" in chosen.explanation
    assert select_device(catalogue, "box:b").info.id == "box:b"


@pytest.fixture
def zoo(install: Install, device_source: Source) -> int:
    """Broken plugins of every kind, installed together beside a good one. Returns how many are broken."""
    for number, (source, _) in enumerate(LOADING.values()):
        install(f"bad-{number}", source)
    for number, (probe, _) in enumerate(PROBES.values()):
        name = f"box{number}"
        install(f"probe-{number}", device_source(name, probe.replace("'box", f"'{name}")))
    install("noisy-good", "print('good morning')\n" + device_source("good", "return Found((info('good', 99),))"))
    install("surplus-good", device_source("good", "return Found((info('good'),))"))
    return len(LOADING) + len(PROBES) + 1


def test_all_of_them_at_once_disturb_no_command(
    zoo: int, in_child: Callable[..., subprocess.CompletedProcess[str]], tiny_model: Path
) -> None:
    listed = in_child("-m", "midspan_cli", "plugins", "--json")
    assert listed.returncode == 0, listed.stderr
    assert "good morning" in listed.stderr
    plugins: list[dict[str, Any]] = json.loads(listed.stdout)["plugins"]
    failed = [plugin for plugin in plugins if plugin["status"] == "failed"]
    assert len(failed) == zoo
    assert all(plugin["error"] and plugin["remedy"] and plugin["traceback"] for plugin in failed)
    assert len({plugin["distribution"] for plugin in failed}) == zoo
    devices = in_child("-m", "midspan_cli", "devices", "--json")
    assert json.loads(devices.stdout)["auto"]["id"] == "good"
    assert len(json.loads(devices.stdout)["unavailable"]) == zoo
    small = ("--device", "reference", "--kv-cache-memory-bytes", "4M", "--max-tokens", "2", "--quiet")
    done = in_child("-m", "midspan_cli", "run", str(tiny_model), "a tale", *small)
    assert done.returncode == 0, done.stderr


def test_asked_for_by_name_its_cause_is_one_message_and_its_traceback_is_shown(
    install: Install,
    device_source: Source,
    in_child: Callable[..., subprocess.CompletedProcess[str]],
    tiny_model: Path,
) -> None:
    source = device_source().replace("lambda info, options: None", "open_box")
    install("midspan-box", f"{source}\ndef open_box(info, options):\n    return unheard_of")
    done = in_child("-m", "midspan_cli", "run", str(tiny_model), "a", "--device", "box")
    assert done.returncode == 1
    assert "Error: The plugin 'box' of midspan-box failed while the device 'box' was opened: NameError" in done.stderr
    assert "midspan_box_module.py" in done.stderr
