"""Operations on rows by the native library: norms, gates, rotary, embedding, greedy sampling.

Inputs may be column slices of a wider tensor: rows must be contiguous, their
distance is passed on.

``torch.empty_like`` is taken where it can be: it costs 1.2 us and ``torch.empty`` with a
type 2.5 to 3.4 us, more than many of these kernels compute.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from midspan.interface import Kernel, KernelSite, No, SamplingBatch, Support, Yes
from midspan.interface.graph import ACTIVATION
from midspan.interface.weights import DENSE
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.portable.sampling import is_plain_greedy, sample
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, numbers, text
from midspan_cpu.native_library import ELEMENT_TYPES, GATE_FUNCTIONS, GGUF_FORMATS, NativeLibrary, RotaryConfig

PRIORITY = 20

Unary = Callable[[torch.Tensor], torch.Tensor]
Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]

_DENSE_CODES = {
    np.dtype(np.float32): ELEMENT_TYPES["float32"],
    np.dtype(ml_dtypes.bfloat16): ELEMENT_TYPES["bfloat16"],
    np.dtype(np.float16): ELEMENT_TYPES["float16"],
}


class NativeRows:
    """Makes the kernels of one program."""

    def __init__(self, preparation: Preparation, library: NativeLibrary) -> None:
        self._preparation = preparation
        self._library = library

    def kernels(self) -> tuple[Kernel, ...]:
        """Kernels named ``native``."""
        return (
            _kernel("rms_norm", self._rms_norm),
            _kernel("add_rms_norm", self._add_rms_norm),
            _kernel("gated", self._gated, _has_function),
            _kernel("gated_pair", self._gated_pair, _has_function),
            _kernel("rotary", self._rotary),
            _kernel("embedding", self._embedding, _has_table),
            _kernel("select_rows", self._select_rows, _has_activation_rows),
            _kernel("sample", self._sample),
        )

    def _rms_norm(self, site: KernelSite) -> Unary:
        weight, epsilon, offset = self._norm(site)
        run, address, size = self._library.rms_norm, weight.data_ptr(), weight.shape[0]
        code, like = ELEMENT_TYPES[site.dtype], torch.empty_like

        def rms_norm(x: torch.Tensor, _keep: object = weight) -> torch.Tensor:
            rows, columns = x.shape
            y = like(x)
            stride = x.stride(0)
            run(code, x.data_ptr(), stride, rows, columns, address, size, epsilon, offset, y.data_ptr(), columns)
            return y

        return rms_norm

    def _add_rms_norm(self, site: KernelSite) -> Callable[[torch.Tensor, torch.Tensor], Pair]:
        weight, epsilon, offset = self._norm(site)
        run, address, size = self._library.add_rms_norm, weight.data_ptr(), weight.shape[0]
        code, like = ELEMENT_TYPES[site.dtype], torch.empty_like

        def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, _keep: object = weight) -> Pair:
            rows, columns = x.shape
            y, total = like(x), like(x)
            run(
                code,
                x.data_ptr(),
                x.stride(0),
                residual.data_ptr(),
                residual.stride(0),
                rows,
                columns,
                address,
                size,
                epsilon,
                offset,
                y.data_ptr(),
                columns,
                total.data_ptr(),
                columns,
            )
            return y, total

        return add_rms_norm

    def _norm(self, site: KernelSite) -> tuple[torch.Tensor, float, float]:
        weight = self._preparation.vector(site.weights["weight"], torch_type(site.dtype))
        return weight, number(site, "epsilon"), number(site, "offset")

    def _gated(self, site: KernelSite) -> Binary:
        run, function = self._library.gated, GATE_FUNCTIONS[text(site, "function")]
        code, empty, dtype = ELEMENT_TYPES[site.dtype], torch.empty, torch_type(site.dtype)

        def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            rows, columns = gate.shape
            y = empty(rows, columns, dtype=dtype)
            stride, up_stride = gate.stride(0), up.stride(0)
            run(code, function, gate.data_ptr(), stride, up.data_ptr(), up_stride, rows, columns, y.data_ptr(), columns)
            return y

        return gated

    def _gated_pair(self, site: KernelSite) -> Unary:
        run, function = self._library.gated, GATE_FUNCTIONS[text(site, "function")]
        code, empty, dtype = ELEMENT_TYPES[site.dtype], torch.empty, torch_type(site.dtype)
        itemsize = dtype.itemsize

        def gated_pair(x: torch.Tensor) -> torch.Tensor:
            rows, columns = x.shape[0], x.shape[1] // 2
            y = empty(rows, columns, dtype=dtype)
            gate, stride = x.data_ptr(), x.stride(0)
            run(code, function, gate, stride, gate + columns * itemsize, stride, rows, columns, y.data_ptr(), columns)
            return y

        return gated_pair

    def _rotary(self, site: KernelSite) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Pair]:
        head_size, dtype = integer(site, "head_size"), torch_type(site.dtype)
        query_columns, key_columns = (int(value.shape[-1]) for value in site.inputs[:2])
        table = self._rotary_table(site)
        config = RotaryConfig(
            table=table.data_ptr(),
            table_rows=table.shape[0],
            head_size=head_size,
            rotary_size=integer(site, "rotary_size"),
            query_heads=query_columns // head_size,
            key_heads=key_columns // head_size,
            type=ELEMENT_TYPES[site.dtype],
            interleaved=int(bool(site.node.attributes["interleaved"])),
        )
        run, empty = self._library.rotary, torch.empty

        def rotary(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, _keep: object = table) -> Pair:
            rows = query.shape[0]
            turned, turned_key = empty(rows, query_columns, dtype=dtype), empty(rows, key_columns, dtype=dtype)
            run(
                config,
                positions.data_ptr(),
                rows,
                query.data_ptr(),
                query.stride(0),
                key.data_ptr(),
                key.stride(0),
                turned.data_ptr(),
                query_columns,
                turned_key.data_ptr(),
                key_columns,
            )
            return turned, turned_key

        return rotary

    def _rotary_table(self, site: KernelSite) -> torch.Tensor:
        """float32 [max_context, rotary_size]: cosines then sines of each position; equal sites share it."""
        frequencies, amplitude = numbers(site, "inverse_frequencies"), number(site, "amplitude")
        rows = self._preparation.bounds.max_context

        def make() -> torch.Tensor:
            angles = torch.arange(rows, dtype=torch.float32).unsqueeze(1) * torch.tensor(frequencies)
            table = torch.cat((angles.cos() * amplitude, angles.sin() * amplitude), dim=1).contiguous()
            self._preparation.account(table.nbytes)
            return table

        return self._preparation.shared(("rotary table", frequencies, amplitude), make)

    def _embedding(self, site: KernelSite) -> Unary:
        weight, scale, dtype = site.weights["weight"], number(site, "scale"), torch_type(site.dtype)
        rows_of_table, columns = weight.shape
        # The table is read where the checkpoint has it, row by row, so a mapped file costs only what is looked up.
        array = np.ascontiguousarray(weight.parts["data" if weight.format == DENSE else "blocks"])
        code = _DENSE_CODES[array.dtype] if weight.format == DENSE else GGUF_FORMATS[weight.format]
        source: object = array
        address, row_bytes = array.ctypes.data, array.nbytes // rows_of_table
        if scale != 1.0 and weight.format == DENSE and code != ELEMENT_TYPES[site.dtype]:
            # Scaled rows are rounded to the activation type before and after, as the definition has it.
            source = rounded = self._preparation.tensor(weight, dtype)
            code, address, row_bytes = ELEMENT_TYPES[site.dtype], rounded.data_ptr(), columns * dtype.itemsize
        run, empty, output = self._library.embedding, torch.empty, ELEMENT_TYPES[site.dtype]

        def embedding(token_ids: torch.Tensor, _keep: object = source) -> torch.Tensor:
            rows = token_ids.shape[0]
            y = empty(rows, columns, dtype=dtype)
            ids = token_ids.data_ptr()
            run(code, address, row_bytes, rows_of_table, columns, scale, ids, rows, output, y.data_ptr(), columns)
            return y

        return embedding

    def _select_rows(self, site: KernelSite) -> Binary:
        # The rows of an activation are looked up as those of a table are.
        code, dtype, columns = ELEMENT_TYPES[site.dtype], torch_type(site.dtype), int(site.inputs[0].shape[-1])
        run, empty, itemsize = self._library.embedding, torch.empty, dtype.itemsize

        def select_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            count, row_bytes = rows.shape[0], x.stride(0) * itemsize
            y = empty(count, columns, dtype=dtype)
            ids = rows.data_ptr()
            run(code, x.data_ptr(), row_bytes, x.shape[0], columns, 1.0, ids, count, code, y.data_ptr(), columns)
            return y

        return select_rows

    def _sample(self, site: KernelSite) -> Callable[[torch.Tensor, SamplingBatch], tuple[torch.Tensor, ...]]:
        run, empty = self._library.argmax, torch.empty
        none, no_tops = empty(0), empty((0, 0))
        no_ids, no_top_ids = none.int(), no_tops.int()

        def choose(logits: torch.Tensor, sampling: SamplingBatch) -> tuple[torch.Tensor, ...]:
            rows, columns = logits.shape
            if not rows or not is_plain_greedy(sampling):
                return sample(logits, sampling)
            ids, failed = empty(rows, dtype=torch.int32), empty(rows, dtype=torch.bool)
            run(logits.data_ptr(), logits.stride(0), rows, columns, ids.data_ptr(), failed.data_ptr())
            return ids, none, no_ids, no_top_ids, no_tops, failed

        return choose


def _kernel(
    op: str,
    prepare: Callable[[KernelSite], Callable[..., object]],
    supports: Callable[[KernelSite], Support] | None = None,
) -> Kernel:
    return Kernel(name="native", op=op, prepare=prepare, supports=supports or _yes, priority=PRIORITY)


def _yes(site: KernelSite) -> Support:
    return Yes()


def _has_function(site: KernelSite) -> Support:
    function = text(site, "function")
    return Yes() if function in GATE_FUNCTIONS else No(f"has no function '{function}'")


def _has_activation_rows(site: KernelSite) -> Support:
    value = site.inputs[0]
    if value.dtype == ACTIVATION and len(value.shape) == 2:
        return Yes()
    return No(f"takes rows of activations, not {value.dtype} {value.shape}")


def _has_table(site: KernelSite) -> Support:
    weight = site.weights["weight"]
    if weight.format == DENSE or weight.format in GGUF_FORMATS:
        return Yes()
    return No(f"does not read tables packed as {weight.format}")
