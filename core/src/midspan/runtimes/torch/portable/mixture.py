"""Portable kernels of the mixture of experts: ``route`` and ``experts``.

Rows are put in order of their experts, so that each chosen expert's weights are read once and multiplied by
all of its rows. Weights are kept in the activation type and widened by tiles, see ``linear``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from midspan.interface.kernel import Kernel, KernelSite
from midspan.runtimes.torch.element_types import torch_type
from midspan.runtimes.torch.portable.elementwise import activation_function
from midspan.runtimes.torch.portable.linear import widened_product
from midspan.runtimes.torch.preparation import Preparation
from midspan.runtimes.torch.site_attributes import integer, number, optional_number, text

Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SMALLEST_SUM = 1e-20
"""Added to a sum by which shares are divided, as the definition has it."""


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """Kernels for ``route`` and ``experts``."""

    def prepare_route(site: KernelSite) -> Route:
        return _route(site, preparation)

    def prepare_experts(site: KernelSite) -> Experts:
        return _experts(site, preparation)

    return (
        Kernel(name="portable", op="route", prepare=prepare_route),
        Kernel(name="portable", op="experts", prepare=prepare_experts),
    )


def _route(site: KernelSite, preparation: Preparation) -> Route:
    top_k, groups, top_groups = (integer(site, name) for name in ("top_k", "groups", "top_groups"))
    sigmoid, summed = text(site, "scoring") == "sigmoid", 2 if text(site, "group_scoring") == "two_largest" else 1
    normalize, scale = bool(site.node.attributes["normalize"]), number(site, "scale")
    # Ranks are decided by differences that 16 bits would not keep.
    bias = preparation.tensor(site.weights["bias"], torch.float32) if "bias" in site.weights else None

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = logits.float()
        scores = torch.sigmoid(wide) if sigmoid else torch.softmax(wide, dim=-1)
        ranking = wide if bias is None and summed == 1 else scores if bias is None else scores + bias
        if groups > 1:
            ranking = _within_groups(ranking, groups, top_groups, summed)
        chosen = _largest(ranking, top_k)
        shares = scores.gather(-1, chosen)
        if normalize:
            shares = shares / (shares.sum(dim=-1, keepdim=True) + SMALLEST_SUM)
        return chosen.to(torch.int32), shares * scale

    return route


def _largest(ranking: torch.Tensor, count: int) -> torch.Tensor:
    """Columns of each row's largest numbers, the lower one first among equals, which topk does not promise."""
    return torch.sort(ranking, dim=-1, descending=True, stable=True).indices[:, :count]


def _within_groups(ranking: torch.Tensor, groups: int, kept: int, summed: int) -> torch.Tensor:
    parts = ranking.reshape(ranking.shape[0], groups, ranking.shape[1] // groups)
    best = parts.topk(summed, dim=-1).values.sum(dim=-1)
    refused = torch.ones_like(best, dtype=torch.bool).scatter_(-1, _largest(best, kept), False)
    return parts.masked_fill(refused.unsqueeze(-1), -torch.inf).reshape(ranking.shape)


def _experts(site: KernelSite, preparation: Preparation) -> Experts:
    dtype = torch_type(site.dtype)
    gate_up, down = (preparation.tensor(site.weights[role], dtype) for role in ("gate_up", "down"))
    biases = [
        preparation.vector(site.weights[role], dtype) if role in site.weights else None
        for role in ("gate_up_bias", "down_bias")
    ]
    function, limit = activation_function(site), optional_number(site, "limit")
    slope, up_offset = number(site, "slope"), number(site, "up_offset")

    def one_expert(x: torch.Tensor, expert: int) -> torch.Tensor:
        bias, down_bias = (None if each is None else each[expert] for each in biases)
        gate, up = widened_product(x, gate_up[expert], bias).chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        middle = function(gate * slope) / slope * (up + up_offset)
        return widened_product(middle, down[expert], down_bias)

    def experts(x: torch.Tensor, expert_ids: torch.Tensor, expert_weights: torch.Tensor) -> torch.Tensor:
        rows, chosen = expert_ids.shape
        flat = expert_ids.reshape(-1).long()
        order = torch.argsort(flat, stable=True)
        made = torch.empty((rows * chosen, x.shape[1]), dtype=torch.float32, device=x.device)
        begin = 0
        for expert, count in enumerate(torch.bincount(flat, minlength=gate_up.shape[0]).tolist()):
            if count:
                places = order[begin : begin + count]
                made[places] = one_expert(x[places // chosen], expert)
                begin += count
        made *= expert_weights.reshape(-1, 1)
        parts = made.view(rows, chosen, x.shape[1])
        total = parts[:, 0].clone()
        for place in range(1, chosen):
            total += parts[:, place]
        return total.to(dtype)

    return experts
