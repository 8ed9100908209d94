"""Published quantized folders: logits equal those of transformers with the numbers that the folders stand for.

Tolerance of logits, 1e-4: see ``test_reference_matches_transformers``. The cpu device's 4-bit products round inputs to
2^-16 of the largest of 32, some 2e-5 of a row's size in each of 14 products after each other, whose sums are larger
than their inputs: 1e-3. Where inputs are rounded to 8 bits, those of
transformers are rounded as well; an input that lies near a half step may then fall either way, and each that does
moves logits by some hundredths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from published_cases import CASES, write_folder

from midspan.graph.passes import apply_passes
from midspan.interface import Device
from midspan.models.catalogue import build_graph
from midspan.weights.checkpoint import open_checkpoint
from midspan.weights.published.catalogue import read_quantized
from midspan.weights.store import CheckpointWeights
from midspan_cpu.plugin import PLUGIN

pytestmark = pytest.mark.slow

NAMES = (
    "gptq 4 bits",
    "gptq 4 bits desc_act",
    "gptq 8 bits",
    "awq",
    "compressed w4a16",
    "compressed w8a8",
    "compressed fp8",
    "fp8 blocks",
    "fp8 one scale",
)

TOLERANCES = {("cpu", "int4.group"): 1e-3, ("any", "int8.dynamic"): 0.15}
"""Of logits, by device and format; see above."""

FIELDS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def _round_rows(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Inputs of a product with 8-bit numbers on both sides, as the format defines them."""
    step = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (torch.where(step > 0, torch.round(inputs[0] / step) * step, inputs[0]),)


@pytest.fixture(params=["reference", "cpu"])
def device(request: pytest.FixtureRequest, reference_device: Device) -> Iterator[Device]:
    if request.param == "reference":
        yield reference_device
        return
    opened = PLUGIN.open(PLUGIN.probe().devices[0], {"threads": "1"})
    yield opened
    opened.close()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_published_folder_equal_those_of_transformers(
    name: str, device: Device, drive: Callable[..., Any], tmp_path: Path
) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**FIELDS, **case.model}, attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if "norm" in key else parameter.shape[-1] ** -0.5))
    weights = {key: parameter.detach().numpy().copy() for key, parameter in model.named_parameters()}
    published = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    plain = write_folder(tmp_path, published, weights, case.config, case.write)
    model.load_state_dict({key: torch.from_numpy(array) for key, array in plain.items()})
    if case.format == "int8.dynamic":
        for key, module in model.named_modules():
            if key.endswith("_proj"):
                module.register_forward_pre_hook(_round_rows)
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, FIELDS["vocab_size"], 41)]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()

    checkpoint = read_quantized(open_checkpoint(tmp_path))
    source = CheckpointWeights(checkpoint, quantizations=device.capabilities.quantizations)
    driver = drive(device, apply_passes(build_graph(checkpoint.config)), source)
    (sequence,) = driver.generate([tokens], 1, budget=16, num_logprobs=FIELDS["vocab_size"])

    found = np.array([sequence.logprobs[0][token] for token in range(FIELDS["vocab_size"])])
    shifted = wanted.astype(np.float64) - wanted.max()
    tolerance = TOLERANCES.get((device.info.id, case.format), TOLERANCES.get(("any", case.format), 1e-4))
    np.testing.assert_allclose(found, shifted - np.log(np.exp(shifted).sum()), rtol=0, atol=tolerance)
    assert np.ptp(wanted) > 1
    assert case.format in {stored for stored, _ in source.packed_as()}
