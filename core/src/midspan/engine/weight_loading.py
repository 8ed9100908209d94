"""The weights that a device compiles a graph with: as published, or quantized on the way.

Joins what was asked for, what the checkpoint holds and which formats the device claims; knows no format's
layout and no device by name.

Invariant: nobody's model is quantized, and no quantized model is taken for another, without having been asked for.
"""

from __future__ import annotations

from collections.abc import Callable

from midspan.errors import SettingsError
from midspan.interface.capabilities import Capabilities
from midspan.interface.graph import Graph
from midspan.interface.weights import DENSE, WeightSource
from midspan.weights.checkpoint import Checkpoint
from midspan.weights.load_quantization import SCHEMES, QuantizingWeights, Scheme
from midspan.weights.published.catalogue import method_of, quantization_of
from midspan.weights.store import CheckpointWeights, LoadProgress


class ModelWeights:
    """A source of weights, and what became of them.

    Args:
        checkpoint: the opened model.
        graph: after all passes.
        quantization: what was asked for, as in ``EngineSettings``.
        capabilities: of the device.
        dtype: the activation type.
        device: its id, for messages.
        report: called after each load.

    Attributes:
        source: for ``Device.compile``.

    Raises:
        SettingsError: the quantization is unknown, the device does not take what it makes, or the model is
            quantized already.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        graph: Graph,
        *,
        quantization: str | None,
        capabilities: Capabilities,
        dtype: str,
        device: str,
        report: Callable[[LoadProgress], None] | None = None,
    ) -> None:
        scheme = _scheme(quantization, checkpoint, capabilities, device)
        self._dtype = dtype
        self._claimed = capabilities.quantizations
        self._stored = CheckpointWeights(
            checkpoint, quantizations=capabilities.quantizations, dtype=dtype, report=report
        )
        self._quantizing = None if scheme is None else QuantizingWeights(self._stored, graph, scheme)
        self.source: WeightSource = self._quantizing or self._stored

    def release(self) -> None:
        """The device has what it needs: pages of the last weight may leave the process."""
        self._stored.release()

    def summary(self) -> str:
        """In which packed formats matrices were given to the device, and which were unpacked; "" where none is."""
        if self._quantizing is not None:
            return self._quantizing.summary()
        return "; ".join(
            self._described(stored, given, count) for (stored, given), count in self._stored.packed_as().items()
        )

    def _described(self, stored: str, given: str, count: int) -> str:
        matrices = f"{count} {'matrix' if count == 1 else 'matrices'}"
        if given == stored:
            return f"{matrices} as {stored}"
        if given != DENSE:
            return f"{matrices} of {stored} as {given}, since the device does not take the former"
        joins = "they cannot be joined with their neighbours" if stored in self._claimed else "the device takes none"
        return f"{matrices} of {stored} unpacked to {self._dtype}: {joins}"


def _scheme(asked: str | None, checkpoint: Checkpoint, capabilities: Capabilities, device: str) -> Scheme | None:
    """How to quantize while loading; None: not at all."""
    published = published_method(checkpoint)
    if asked is None or asked == published:
        return None
    if published is not None:
        raise SettingsError(
            f"quantization is {asked!r}, but {checkpoint.path} was published quantized already ({published}).",
            remedy="Leave it out, or take the model in 16 bits.",
        )
    scheme = SCHEMES.get(asked)
    if scheme is None:
        raise SettingsError(
            f"There is no quantization {asked!r} for a model that was not published with it.",
            remedy=f"Take {', '.join(SCHEMES)}, or leave it out.",
        )
    if scheme.format not in capabilities.quantizations:
        served = [one.name for one in SCHEMES.values() if one.format in capabilities.quantizations]
        raise SettingsError(
            f"quantization {asked!r} makes weights of the format {scheme.format}, which the device {device} does not "
            "take; unpacked again they would be less exact and no smaller.",
            remedy=f"Take {', '.join(served)}." if served else "Leave it out, or take another device.",
        )
    return scheme


def published_method(checkpoint: Checkpoint) -> str | None:
    """How the model was quantized when it was published, or None; ``gguf`` for the formats of such files."""
    formats = {tensor.format for tensor in checkpoint.tensors.values()} - {DENSE}
    if not formats:
        return None
    quantization = quantization_of(checkpoint.config)
    return "gguf" if quantization is None else method_of(quantization)
