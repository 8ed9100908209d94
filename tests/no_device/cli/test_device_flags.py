"""``--device`` once or several times, and options that are meant for one of them."""

from __future__ import annotations

from typing import Any

import pytest

from midspan.errors import SettingsError
from midspan_cli.engine_flags import EngineFlags


def test_each_device_gets_settings_of_its_own_in_the_order_of_the_flags() -> None:
    flags = EngineFlags(
        device=["one", "two:1", "one"],
        device_option=["threads=2", "two:1/path=/tmp/x", "one/mode=a/b"],
        kernel=["two:1/linear=fast"],
        block_size=8,
    )
    first, second, third = flags.replica_settings("model")
    assert [settings.device for settings in (first, second, third)] == ["one", "two:1", "one"]
    assert first.device_options == third.device_options == {"threads": "2", "mode": "a/b"}
    assert second.device_options == {"threads": "2", "path": "/tmp/x"}
    assert (first.kernels, second.kernels) == ({}, {"linear": "fast"})
    assert {settings.block_size for settings in (first, second, third)} == {8}


def test_one_device_is_one_settings_and_auto_is_taken_without_a_flag() -> None:
    assert EngineFlags().settings("model").device == "auto"
    assert EngineFlags(device=["one"], device_option=["file=/a/b"]).settings("model").device_options == {"file": "/a/b"}
    assert len(EngineFlags().replica_settings("model")) == 1


def test_an_option_for_a_device_that_was_not_named_is_refused() -> None:
    with pytest.raises(SettingsError, match="'three', but the devices are one, two"):
        EngineFlags(device=["one", "two"], device_option=["three/threads=2"]).replica_settings("model")


@pytest.mark.parametrize("command", [("run", "nothing", "hello"), ("chat", "nothing"), ("bench", "nothing")])
def test_other_commands_take_one_device(midspan: Any, command: tuple[str, ...]) -> None:
    done = midspan(*command, "--device", "one", "--device", "two")
    assert done.returncode == 1
    assert "runs on one device; one, two were named" in done.stderr


def test_config_shows_all_devices(midspan: Any) -> None:
    done = midspan("config", "model-x", "--device", "one", "--device", "two")
    assert done.returncode == 0, done.stderr
    assert "one two" in done.stdout
