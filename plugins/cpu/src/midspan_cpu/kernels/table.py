"""The device's table of kernels, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from midspan.errors import PluginError
from midspan.interface import Kernel, KernelSite, No, Support
from midspan.runtimes.torch.preparation import Preparation
from midspan_cpu.kernels import (
    native_arithmetic,
    native_attention,
    native_experts,
    native_linear,
    native_sampling,
    onednn_linear,
)
from midspan_cpu.kernels.native_rows import NativeRows
from midspan_cpu.native_library import NativeLibrary, load_native_library

NATIVE_OPERATIONS = (
    "add",
    "add_rms_norm",
    "attention",
    "embedding",
    "experts",
    "gated",
    "gated_pair",
    "linear",
    "logits",
    "multiply",
    "rms_norm",
    "rotary",
    "route",
    "sample",
    "scale",
    "scale_rows",
    "select_rows",
)
"""Operations for which the native library has a kernel."""


class KernelSet:
    """All kernels of an opened device.

    Attributes:
        native: the native library, opened; None where it cannot be.
        missing: why there is none, for people; "" where there is.
    """

    def __init__(self, *, threads: int, instruction_set: str | None) -> None:
        loaded = load_native_library(instruction_set=instruction_set, threads=threads)
        self.native = loaded if isinstance(loaded, NativeLibrary) else None
        self.missing = "" if isinstance(loaded, NativeLibrary) else loaded.reason

    def kernels(self, preparation: Preparation) -> Sequence[Kernel]:
        """The kernels for one program."""
        table = [*onednn_linear.kernels(preparation)]
        if self.native is None:
            # They stay in the table and refuse, so that the placement report tells why a slower one serves.
            return [*table, *(_refusing(op, self.missing) for op in NATIVE_OPERATIONS)]
        table += native_linear.kernels(preparation, self.native)
        table += NativeRows(preparation, self.native).kernels()
        table += native_arithmetic.kernels(self.native)
        table += native_experts.kernels(preparation, self.native)
        table += native_attention.kernels(preparation, self.native)
        table += native_sampling.kernels(self.native)
        return table

    def close(self) -> None:
        """End the native library's threads."""
        if self.native is not None:
            self.native.close()
            self.native = None


def _refusing(op: str, reason: str) -> Kernel:
    def supports(site: KernelSite) -> Support:
        return No(reason)

    def prepare(site: KernelSite) -> Callable[..., object]:
        raise PluginError(f"the native kernel for '{op}' cannot be used: {reason}", plugin="cpu")

    return Kernel(name="native", op=op, prepare=prepare, supports=supports, priority=native_linear.PRIORITY)
