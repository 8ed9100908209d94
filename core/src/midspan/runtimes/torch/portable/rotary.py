"""Portable kernel of ``rotary``: rotary position embedding.

Su et al., "RoFormer" (2021), in both published layouts of the pairs. The angles
of a step are computed once and read by every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.portable.normalization import runs_of
from midspan.runtimes.torch.preparation import OncePerStep, Preparation
from midspan.runtimes.torch.site_attributes import integer, number, numbers

Angles = tuple[torch.Tensor, torch.Tensor]
Rotate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """The kernel for ``rotary``."""

    def prepare(site: KernelSite) -> Rotate:
        return _rotary(site, preparation)

    return (Kernel(name="portable", op="rotary", prepare=prepare),)


def step_angles(site: KernelSite, preparation: Preparation) -> OncePerStep[Angles]:
    """Cosines and sines of a step's positions, times the amplitude: float32 [T, rotary_size / 2] each.

    Sites with equal attributes share them.
    """
    frequencies, amplitude = numbers(site, "inverse_frequencies"), number(site, "amplitude")

    def make() -> OncePerStep[Angles]:
        inverse = torch.tensor(frequencies, dtype=torch.float32, device=preparation.device)

        def angles(positions: torch.Tensor) -> Angles:
            turns = positions.float().unsqueeze(1) * inverse
            return turns.cos() * amplitude, turns.sin() * amplitude

        return OncePerStep(angles)

    return preparation.shared(("rotary angles", frequencies, amplitude), make)


def _rotary(site: KernelSite, preparation: Preparation) -> Rotate:
    head_size, rotary_size = integer(site, "head_size"), integer(site, "rotary_size")
    angles = step_angles(site, preparation)
    interleaved = bool(site.node.attributes["interleaved"])

    def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        heads = runs_of(x, head_size).float()
        turned = heads[..., :rotary_size]
        if interleaved:
            first, second = turned[..., 0::2], turned[..., 1::2]
        else:
            first, second = turned.chunk(2, dim=-1)
        parts = (first * cosine - second * sine, second * cosine + first * sine)
        result = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
        if rotary_size < head_size:
            result = torch.cat((result, heads[..., rotary_size:]), dim=-1)
        return result.flatten(-2).to(x.dtype)

    def rotary(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = angles(positions)
        cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
        return rotate(query, cosine, sine), rotate(key, cosine, sine)

    return rotary
