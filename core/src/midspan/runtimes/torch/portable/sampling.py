"""Portable kernel of ``sample``: the reference's procedure, with a short way for greedy steps.

A step in which every row is greedy and nothing else is asked needs the largest
logit of each row only, which torch finds with all its threads. Everything else
goes to the reference on the host, so that the tokens are those of its definition.
"""

from __future__ import annotations

import torch

from midspan.interface.batch import SamplingBatch
from midspan.interface.kernel import Kernel
from midspan.runtimes.reference.sample_outputs import outputs_of
from midspan.runtimes.reference.sampling import sample as sample_on_host
from midspan.runtimes.torch.element_types import copy_out
from midspan.runtimes.torch.preparation import Preparation

Outputs = tuple[torch.Tensor, ...]


def kernels(preparation: Preparation) -> tuple[Kernel, ...]:
    """The kernel for ``sample``."""
    return (Kernel(name="portable", op="sample", prepare=lambda site: sample),)


def sample(logits: torch.Tensor, sampling: SamplingBatch) -> Outputs:
    """Choose a token for each row.

    Args:
        logits: float32 [S, V].
        sampling: how.

    Returns:
        The six outputs of the operation; logprob outputs have no elements when none were asked for.
    """
    if is_plain_greedy(sampling):
        values, tokens = logits.max(dim=1)
        invalid = values.isfinite().logical_not_()
        none, no_tops = logits.new_empty(0), logits.new_empty((0, 0))
        return tokens.int().masked_fill_(invalid, 0), none, none.int(), no_tops.int(), no_tops, invalid
    found = outputs_of(sample_on_host(copy_out(logits), sampling))
    return tuple(torch.from_numpy(array) for array in found)


def is_plain_greedy(sampling: SamplingBatch) -> bool:
    """Whether the largest logit of each row is all that is asked for."""
    plain = sampling.adjustments is None and sampling.allowed is None and sampling.has_target is None
    return plain and sampling.num_logprobs is None and not sampling.temperature.any()
