"""Loading the native library, and calling it from several threads."""

from __future__ import annotations

import _ctypes
import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import midspan_cpu
from midspan.errors import SettingsError
from midspan_cpu import native_library
from midspan_cpu.native_library import NativeLibrary, Unavailable, load_native_library
from midspan_cpu.settings import read_cpu_environment


def library_folder() -> Path:
    return next(Path(path) for path in midspan_cpu.__path__ if (Path(path) / native_library.FILE_NAME).is_file())


def test_without_its_file_the_library_is_unavailable_and_says_why(tmp_path: Path) -> None:
    found = load_native_library(instruction_set=None, threads=1, folders=[str(tmp_path)])
    assert isinstance(found, Unavailable)
    assert native_library.FILE_NAME in found.reason


def test_a_damaged_file_is_unavailable_and_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / native_library.FILE_NAME
    path.write_bytes(b"not a library")
    found = load_native_library(instruction_set=None, threads=1, folders=[str(tmp_path)])
    assert isinstance(found, Unavailable)
    assert str(path) in found.reason


def test_another_library_is_not_taken_for_this_one(tmp_path: Path) -> None:
    shutil.copy(_ctypes.__file__, tmp_path / native_library.FILE_NAME)
    found = load_native_library(instruction_set=None, threads=1, folders=[str(tmp_path)])
    assert isinstance(found, Unavailable)
    assert "interface version" in found.reason


def test_none_turns_native_kernels_off() -> None:
    found = load_native_library(instruction_set="none", threads=1)
    assert isinstance(found, Unavailable)


def test_an_unknown_instruction_set_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="portable"):
        load_native_library(instruction_set="mmx", threads=1)


def test_the_fastest_set_is_taken_and_what_is_emulated_comes_last() -> None:
    found = load_native_library(instruction_set=None, threads=1)
    assert isinstance(found, NativeLibrary)
    assert found.instruction_set == found.runnable_sets[0]
    assert found.runnable_sets[-2:] == ("portable", "amx_emulated")
    found.close()


def test_the_environment_names_the_instruction_set() -> None:
    assert read_cpu_environment({"MIDSPAN_CPU_ISA": "avx2"}).instruction_set == "avx2"
    assert read_cpu_environment({"MIDSPAN_CPU_ISA": ""}).instruction_set is None
    assert read_cpu_environment({}).instruction_set is None


def test_results_do_not_depend_on_the_number_of_threads(kernels: Any, rng: np.random.Generator) -> None:
    x = rng.standard_normal((37, 500)).astype(np.float32)
    packed = kernels.pack(rng.standard_normal((333, 500)).astype(ml_dtypes.bfloat16))
    expected = kernels.linear(x, packed)
    for threads in [1, 2, 7]:
        library = load_native_library(instruction_set=kernels.library.instruction_set, threads=threads)
        assert isinstance(library, NativeLibrary)
        assert type(kernels)(library).linear(x, packed).tobytes() == expected.tobytes()
        library.close()


def test_another_parallel_loop_may_be_given(kernels: Any, rng: np.random.Generator) -> None:
    body_type = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    ranges = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    def parallel_for(begin: int, end: int, grain: int, body: int, argument: int) -> int:
        ranges.append((begin, end))
        body_type(body)(begin, end, argument)
        return 0

    address = ctypes.cast(parallel_for, ctypes.c_void_p).value
    library = load_native_library(instruction_set=kernels.library.instruction_set, threads=4, parallel_for=address)
    assert isinstance(library, NativeLibrary)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    packed = kernels.pack(rng.standard_normal((200, 64)).astype(np.float32))
    assert type(kernels)(library).linear(x, packed).tobytes() == kernels.linear(x, packed).tobytes()
    assert (0, 4) in ranges
    library.close()


def test_calls_of_several_threads_in_one_context_do_not_disturb_each_other(
    kernels: Any, rng: np.random.Generator
) -> None:
    packed = kernels.pack(rng.standard_normal((150, 300)).astype(ml_dtypes.bfloat16))
    inputs = [rng.standard_normal((20 + index, 300)).astype(np.float32) for index in range(4)]
    expected = [kernels.linear(x, packed).tobytes() for x in inputs]
    wrong: list[int] = []

    def call(index: int) -> None:
        for _ in range(200):
            if kernels.linear(inputs[index], packed).tobytes() != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nothing_is_read_or_written_behind_the_buffers(kernels: Any) -> None:
    script = Path(__file__).parent / "guarded_calls.py"
    result = subprocess.run(
        [sys.executable, str(script), kernels.library.instruction_set], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, f"ended with {result.returncode} after: {result.stdout}\n{result.stderr}"
    assert result.stdout.endswith("done\n")
