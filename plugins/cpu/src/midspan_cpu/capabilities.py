"""What the device claims to do.

Knows which claims need the native library; without it the device computes with
torch alone, slower, and claims less.
"""

from __future__ import annotations

from midspan.interface import Capabilities
from midspan_cpu.native_interface import GGUF_FORMATS, SCALED_FORMATS

QUANTIZATIONS = (*GGUF_FORMATS, *SCALED_FORMATS)
"""Packed formats that the native products read as they are."""


def capabilities(*, native: bool) -> Capabilities:
    """The device's claims.

    Args:
        native: the native kernels are there. Their outputs for a token have the same bits
            whatever else is in the batch; torch's products pick an order of summation by size.
    """
    dtypes = ("bfloat16", "float32", "float16")
    return Capabilities(
        dtypes=dtypes,
        cache_dtypes=(*dtypes, "float8_e4m3", "int8"),
        block_sizes=(16, 32, 64, 128),
        quantizations=QUANTIZATIONS if native else (),
        batch_invariant=native,
        deterministic=True,
        shares_host_memory=True,
    )
