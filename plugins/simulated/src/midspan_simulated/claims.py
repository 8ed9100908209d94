"""What an opened device claims: nothing but what its options switch on.

Knows data sheets for the element types that an accelerator computes in.
"""

from __future__ import annotations

from midspan.errors import SettingsError
from midspan.interface.capabilities import Capabilities
from midspan_simulated.data_sheet import DataSheet
from midspan_simulated.options import SimulatedOptions

PLAIN_BLOCK_SIZES = (24, 7, 16)
"""No power of two in front: what assumes one shows."""

SHEET_BLOCK_SIZES = (16, 24, 7)


def claims(options: SimulatedOptions, sheet: DataSheet | None) -> Capabilities:
    """The capabilities of a device.

    Args:
        options: of the device.
        sheet: None for the plain device.

    Raises:
        SettingsError: a type that the accelerator does not compute in.
    """
    offered = ("float32",) if sheet is None else sheet.dtypes()
    dtypes = options.dtypes or offered
    missing = [] if sheet is None else [dtype for dtype in dtypes if dtype not in sheet.peaks]
    if sheet is not None and missing:
        raise SettingsError(
            f"No peak of {sheet.product} in {missing[0]} is published, so its time cannot be modelled.",
            remedy=f"Take dtypes={','.join(offered)}, or some of them.",
        )
    return Capabilities(
        dtypes=dtypes,
        cache_dtypes=options.cache_dtypes or dtypes,
        block_sizes=options.block_sizes or (PLAIN_BLOCK_SIZES if sheet is None else SHEET_BLOCK_SIZES),
        quantizations=options.quantizations,
        asynchronous=options.asynchronous,
        captures_graphs=options.captures_graphs,
        max_world_size=options.world_size,
        batch_invariant=options.batch_invariant,
        deterministic=options.deterministic,
        max_logprobs=options.max_logprobs,
        max_tokens=options.max_tokens,
        max_requests=options.max_requests,
        max_context=options.max_context,
        max_sampled_rows=options.max_sampled_rows,
        virtual_clock=sheet is not None,
    )
