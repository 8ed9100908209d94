"""The native kernels, called through ctypes.

For: turning ``native/midspan_cpu.h`` into typed Python. Addresses and sizes go in;
this module knows no array library, no graph and no kernel table. What each
function computes, and what it demands of its arguments, stands in the header.

Invariants: a library whose interface version differs is not used; after ``close``
nothing may be called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from midspan.errors import MidspanError, PluginError, SettingsError
from midspan_cpu.native_interface import (
    ABI_VERSION,
    ELEMENT_TYPES,
    GATE_FUNCTIONS,
    GGUF_FORMATS,
    SIGNATURES,
    AttentionConfig,
    Instruction,
    LinearConfig,
    RotaryConfig,
    SamplingConfig,
    Step,
    WeightConfig,
)

__all__ = [
    "ELEMENT_TYPES",
    "GATE_FUNCTIONS",
    "GGUF_FORMATS",
    "AttentionConfig",
    "LinearConfig",
    "NativeLibrary",
    "RotaryConfig",
    "Unavailable",
    "WeightConfig",
    "load_native_library",
]

FILE_NAME = "libmidspan_cpu_native.so"
NO_INSTRUCTION_SET = "none"

SPIN_MICROSECONDS = 50
"""How long an idle thread polls before it sleeps: longer than the gap between two kernels of a step."""


@dataclass(frozen=True, kw_only=True)
class Unavailable:
    """There are no native kernels here.

    Attributes:
        reason: why, for a person.
    """

    reason: str


class NativeLibrary:
    """A context of the native library: an instruction set and some threads.

    All addresses are integers; strides and sizes count elements, except those named bytes.
    Every method that computes raises ``PluginError`` when the library refuses.

    Attributes:
        instruction_set: the name of the one in use.
        runnable_sets: those that the library holds and this processor runs, the fastest first.
        threads: threads that share the work, the calling one included.
    """

    def __init__(
        self, library: ctypes.CDLL, *, instruction_set: str | None, threads: int, parallel_for: int | None
    ) -> None:
        name = None if instruction_set is None else instruction_set.encode()
        self._library = library
        self._context = c_void_p(library.midspan_cpu_create(name, threads, parallel_for, SPIN_MICROSECONDS))
        if not self._context:
            raise PluginError(
                f"the native library makes no context for instruction set {instruction_set!r}, {threads} threads.",
                plugin="cpu",
            )
        self.instruction_set: str = library.midspan_cpu_instruction_set(self._context).decode()
        self.runnable_sets = _runnable_sets(library)
        self.threads = threads
        for function, types in SIGNATURES.items():
            entry = getattr(library, f"midspan_cpu_{function}")
            entry.argtypes, entry.restype = (c_void_p, *types), c_int32
        self._run_plan = library.midspan_cpu_run_plan

    def close(self) -> None:
        """End the threads and free scratch memory. A second call does nothing."""
        context, self._context = self._context, c_void_p()
        self._library.midspan_cpu_destroy(context)

    def _check(self, result: int) -> None:
        if result:
            text = self._library.midspan_cpu_error_text(result).decode()
            raise PluginError(f"the native kernel refused: {text}.", plugin="cpu")

    def advise_huge_pages(self, address: int, size: int) -> None:
        """Ask for huge pages under ``size`` bytes, before they are first written."""
        self._library.midspan_cpu_advise_huge_pages(address, size)

    def dense_format(self, weight_type: int, input_type: int) -> int:
        """The dense format in which a weight of a type is multiplied fastest with inputs of a type."""
        code: int = self._library.midspan_cpu_dense_format(self._context, weight_type, input_type)
        return code

    def packed_linear_bytes(self, weight: WeightConfig) -> int:
        """Bytes of a packed weight; 0 when it is not supported. Reads no address."""
        size: int = self._library.midspan_cpu_packed_linear_bytes(byref(weight))
        return size

    def pack_linear(self, weight: WeightConfig, packed: int) -> None:
        """Pack a weight to ``packed`` (64-byte aligned)."""
        self._check(self._library.midspan_cpu_pack_linear(self._context, byref(weight), packed))

    def argmax(self, logits: int, stride: int, rows: int, columns: int, ids: int, failed: int) -> None:
        """Largest column of each float32 row to int32 ids; uint8 failed marks rows that cannot be sampled."""
        if not self._context:
            raise MidspanError("The device was closed.")
        self._check(self._library.midspan_cpu_argmax(self._context, logits, stride, rows, columns, ids, failed))

    def sample(
        self, config: SamplingConfig, logits: int, stride: int, rows: int, columns: int, ids: int, failed: int
    ) -> None:
        """A token of each float32 row to int32 ids; uint8 failed marks rows that cannot be sampled."""
        if not self._context:
            raise MidspanError("The device was closed.")
        library = self._library
        self._check(
            library.midspan_cpu_sample(self._context, byref(config), logits, stride, rows, columns, ids, failed)
        )

    def run_plan(self, instructions: ctypes.Array[Instruction], step: Step, begin: int, end: int) -> None:
        """Run instructions ``begin`` to ``end`` one after the other in one call.

        Args:
            instructions: what to run; addresses in it are alive.
            step: counts and integer arrays of the step.
            begin, end: which of them.
        """
        self._execute(instructions, step, begin, end, None)

    def time_plan(self, instructions: ctypes.Array[Instruction], step: Step, begin: int, end: int) -> list[int]:
        """Run instructions as ``run_plan`` does; nanoseconds that each took."""
        spent = (c_int64 * (end - begin))()
        self._execute(instructions, step, begin, end, spent)
        return list(spent)

    def _execute(
        self, instructions: ctypes.Array[Instruction], step: Step, begin: int, end: int, spent: object
    ) -> None:
        if not self._context:
            raise MidspanError("The device was closed.")
        failed = c_int64()
        first = ctypes.addressof(instructions) + begin * INSTRUCTION_BYTES
        result = self._run_plan(self._context, first, end - begin, byref(step), spent, byref(failed))
        if result:
            self._check(result)


INSTRUCTION_BYTES = ctypes.sizeof(Instruction)

Loaded = Union[NativeLibrary, Unavailable]


def load_native_library(
    *, instruction_set: str | None, threads: int, parallel_for: int | None = None, folders: Sequence[str] | None = None
) -> Loaded:
    """Open the library and make a context.

    Args:
        instruction_set: a name; None for the fastest; ``"none"`` for no native kernels.
        threads: threads that share the work, the calling one included.
        parallel_for: address of a function with the signature of ``torch_parallel_for`` through which
            to reach other threads; None: the context has threads of its own.
        folders: where the library may lie; None: the folders of this package.

    Raises:
        SettingsError: the instruction set does not exist or the processor lacks it.
    """
    if instruction_set == NO_INSTRUCTION_SET:
        return Unavailable(reason="native kernels are turned off (instruction set 'none')")
    path = _find(folders)
    if path is None:
        return Unavailable(reason=f"{FILE_NAME} is not in the package; it was installed without its native part")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return Unavailable(reason=f"{path} cannot be loaded: {error}")
    found = _abi_version(library)
    if found != ABI_VERSION:
        return Unavailable(reason=f"{path} has interface version {found}, wanted is {ABI_VERSION}; install again")
    _declare(library)
    sets = _runnable_sets(library)
    if instruction_set is None:
        instruction_set = sets[0]
    elif instruction_set not in sets:
        raise SettingsError(
            f"instruction set '{instruction_set}' cannot be used on this processor.",
            remedy=f"Take one of {', '.join([*sets, NO_INSTRUCTION_SET])}, or leave MIDSPAN_CPU_ISA unset.",
        )
    try:
        return NativeLibrary(library, instruction_set=instruction_set, threads=threads, parallel_for=parallel_for)
    except MidspanError as error:
        return Unavailable(reason=str(error))


def _runnable_sets(library: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(library.midspan_cpu_instruction_sets().decode().split())


def _find(folders: Sequence[str] | None) -> Path | None:
    if folders is None:
        import midspan_cpu

        folders = list(midspan_cpu.__path__)
    candidates = [Path(folder) / FILE_NAME for folder in folders]
    return next((path for path in candidates if path.is_file()), None)


def _abi_version(library: ctypes.CDLL) -> int | None:
    try:
        function = library.midspan_cpu_abi_version
    except AttributeError:
        return None
    function.argtypes, function.restype = (), c_uint32
    version: int = function()
    return version


def _declare(library: ctypes.CDLL) -> None:
    """Argument types of the functions that are no kernels."""
    signatures: dict[str, tuple[tuple[Any, ...], Any]] = {
        "error_text": ((c_int32,), c_char_p),
        "instruction_sets": ((), c_char_p),
        "create": ((c_char_p, c_int32, c_void_p, c_int32), c_void_p),
        "destroy": ((c_void_p,), None),
        "instruction_set": ((c_void_p,), c_char_p),
        "advise_huge_pages": ((c_void_p, c_int64), None),
        "dense_format": ((c_void_p, c_int32, c_int32), c_int32),
        "packed_linear_bytes": ((POINTER(WeightConfig),), c_int64),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, f"midspan_cpu_{name}")
        function.argtypes, function.restype = arguments, result
