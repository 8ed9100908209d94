"""Options, what they switch on, and what the probe finds."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from midspan.devices.discovery import discover
from midspan.devices.selection import select_device
from midspan.errors import SettingsError
from midspan.interface import Capabilities, Found
from midspan_simulated.data_sheet_table import DATA_SHEETS
from midspan_simulated.fault_plan import FAULTS, Fault
from midspan_simulated.options import OPTIONS, SimulatedOptions, help_text, read_options
from midspan_simulated.plugin import PLUGIN
from midspan_simulated.settings import PROBE_SECONDS, read_simulated_environment

OpenSimulated = Callable[..., Any]
DOCUMENT = Path(__file__).resolve().parents[3] / "docs/simulated-devices.md"


def test_every_feature_is_off_until_it_is_switched_on(open_simulated: OpenSimulated) -> None:
    claimed = open_simulated().capabilities
    assert claimed == Capabilities(block_sizes=(24, 7, 16))
    everything = open_simulated(
        dtypes="bfloat16,float32",
        cache_dtypes="float16",
        block_sizes="5,9",
        quantizations="gguf.q8_0",
        batch_invariant="on",
        deterministic="true",
        asynchronous="1",
        captures_graphs="on",
        world_size="4",
        max_logprobs="7",
        max_tokens="100",
        max_requests="9",
        max_context="64",
        max_sampled_rows="8",
        memory="64MiB",
    )
    assert everything.capabilities == Capabilities(
        dtypes=("bfloat16", "float32"),
        cache_dtypes=("float16",),
        block_sizes=(5, 9),
        quantizations=("gguf.q8_0",),
        batch_invariant=True,
        deterministic=True,
        asynchronous=True,
        captures_graphs=True,
        max_world_size=4,
        max_logprobs=7,
        max_tokens=100,
        max_requests=9,
        max_context=64,
        max_sampled_rows=8,
    )
    assert everything.memory().total_bytes == everything.info.memory_bytes == 64 * 2**20
    assert open_simulated("h100").capabilities.virtual_clock


def test_options_are_read_as_they_are_written() -> None:
    found = read_options(
        {
            "numerics": "off",
            "fault": "lost@12,kernel",
            "fault_once": "/tmp/x",
            "devices": "2",
            "weights": "int8",
            "compute_efficiency": "0.7",
            "bandwidth_efficiency": "0.9",
            "memory": "80GB",
            "refuse": "linear,attention",
        }
    )
    assert found == SimulatedOptions(
        numerics=False,
        fault=(Fault(kind="lost", step=12), Fault(kind="kernel")),
        fault_once="/tmp/x",
        devices=2,
        weights="int8",
        compute_efficiency=0.7,
        bandwidth_efficiency=0.9,
        memory=80 * 10**9,
        refuse=("linear", "attention"),
    )
    assert read_options({}) == SimulatedOptions()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("numerics", "maybe"),
        ("memory", "0"),
        ("memory", "4 GiB"),
        ("memory", "99999999TiB"),
        ("dtypes", "float64"),
        ("dtypes", ""),
        ("dtypes", "float32,float32"),
        ("block_sizes", "0"),
        ("block_sizes", "-7"),
        ("block_sizes", "16,"),
        ("quantizations", "gguf.q4_0"),
        ("world_size", "two"),
        ("max_tokens", "1e3"),
        ("refuse", "matmul"),
        ("fault", "explode@3"),
        ("fault", "lost"),
        ("fault", "lost@0"),
        ("fault", "lost@x"),
        ("fault", "compile@3"),
        ("fault_once", ""),
        ("weights", "int3"),
        ("weights", "int4,int8"),
        ("compute_efficiency", "0"),
        ("compute_efficiency", "1.5"),
        ("bandwidth_efficiency", "nan"),
        ("bandwidth_efficiency", "fast"),
    ],
)
def test_a_wrong_value_is_refused_with_what_could_be_written(name: str, text: str) -> None:
    with pytest.raises(SettingsError, match=f"option {name}=") as error:
        read_options({name: text})
    assert f"Write {name}=" in error.value.remedy


def test_an_unknown_option_is_refused_with_a_list_of_all() -> None:
    with pytest.raises(SettingsError, match="no option 'speed'") as error:
        read_options({"speed": "1"})
    assert all(f"{record.name}=" in error.value.remedy for record in OPTIONS)
    assert all(how in help_text() for how in FAULTS.values())


def test_a_file_for_faults_needs_a_fault() -> None:
    with pytest.raises(SettingsError, match="no fault is asked for"):
        read_options({"fault_once": "/tmp/x"})


def test_the_records_are_the_options_and_the_document_lists_both_them_and_the_sheets() -> None:
    assert [record.name for record in OPTIONS] == [field.name for field in fields(SimulatedOptions)]
    text = DOCUMENT.read_text(encoding="utf-8")
    for record in OPTIONS:
        value = record.value.replace("|", r"\|")
        row = f"| `{record.name}={value}` | {record.default} | {record.meaning} |"
        assert row in text, row
    for kind, how in FAULTS.items():
        written, _, meaning = how.partition(" ")
        assert f"| `{written}` | {meaning} |" in text, kind
    for sheet in DATA_SHEETS.values():
        peaks = ", ".join(f"{dtype} {peak / 1e12:g}" for dtype, peak in sheet.peaks.items())
        link = "not published" if sheet.link_bandwidth is None else f"{sheet.link_bandwidth / 1e9:.4g}"
        row = (
            f"| `simulated:{sheet.name}` | {sheet.product} ({sheet.kind}) | {sheet.memory_bytes / 1e9:.4g} "
            f"| {sheet.bandwidth / 1e9:.4g} | {peaks} | {link} |"
        )
        assert row in text, row
        for source in sheet.sources:
            assert f"[{source.title}]({source.url})" in text
        for assumption in sheet.assumptions:
            assert assumption in text


def test_auto_never_takes_a_device_that_is_not_there() -> None:
    catalogue = discover()
    assert not select_device(catalogue, "auto").info.id.startswith("simulated")
    assert select_device(catalogue, "simulated").info.id == "simulated"
    assert select_device(catalogue, "simulated:h100").info.id == "simulated:h100"
    found = PLUGIN.probe()
    assert isinstance(found, Found)
    assert all(info.preference < 0 for info in found.devices)
    assert [info.id for info in found.devices[1:]] == [f"simulated:{name}" for name in DATA_SHEETS]


def test_the_probe_is_as_slow_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    PLUGIN.probe()
    monkeypatch.setenv(PROBE_SECONDS, "0.25")
    PLUGIN.probe()
    assert waited == [0.25]
    for text in ("soon", "-1", "inf", "nan"):
        with pytest.raises(SettingsError, match=PROBE_SECONDS):
            read_simulated_environment({PROBE_SECONDS: text})


def test_the_entry_point_loads_nothing_but_names_and_figures() -> None:
    program = (
        "import sys, json; before = set(sys.modules); import midspan_simulated.plugin as p; p.PLUGIN.probe();"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "midspan_simulated.data_sheet_table" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("torch", "jax", "transformers")]
    assert "midspan.runtimes" not in loaded
    assert "midspan_simulated.device" not in loaded
