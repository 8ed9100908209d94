"""The text side of a model: its tokenizer, what ends a text, and its default parameters.

Lives where requests come in; needs no device and none of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midspan.decoding.sampling_params import SamplingParams
from midspan.errors import InvalidRequest
from midspan.settings import EngineSettings
from midspan.text.tokenizer import Tokenizer, load_tokenizer
from midspan.weights.checkpoint import Checkpoint, open_checkpoint

logger = logging.getLogger("midspan.engine")

GENERATION_FIELDS: Mapping[str, str] = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Fields of ``generation_config.json`` that become defaults -> their names in ``SamplingParams``."""

LARGEST_TOKEN_ID = 2**31 - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelText:
    """What is known of a model without its weights.

    Attributes:
        tokenizer: the model's, or the one that the settings name.
        eos_token_ids: every id that ends a text, by tokenizer, config or generation config.
        default_params: by names of ``SamplingParams``.
    """

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    default_params: dict[str, Any]


def load_model_text(settings: EngineSettings, path: Path) -> ModelText:
    """Load the text side of a model.

    Args:
        settings: may name another tokenizer.
        path: the model's files.

    Raises:
        CheckpointError, UnsupportedModel: files are damaged or not understood.
    """
    checkpoint = open_checkpoint(path, weights=settings.reads_weights)
    tokenizer = load_tokenizer(Path(settings.tokenizer) if settings.tokenizer is not None else path)
    return ModelText(
        tokenizer=tokenizer,
        eos_token_ids=_eos_token_ids(tokenizer, checkpoint),
        default_params=default_params(checkpoint.generation_config),
    )


def default_params(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of a generation config; values that no request could have are left out, with a warning."""
    found: dict[str, Any] = {}
    for field, name in GENERATION_FIELDS.items():
        value = generation_config.get(field)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except InvalidRequest as error:
            logger.warning("generation_config.json: %s is ignored: %s", field, error)
        else:
            found[name] = value
    return found


def _eos_token_ids(tokenizer: Tokenizer, checkpoint: Checkpoint) -> tuple[int, ...]:
    ids = set(tokenizer.eos_token_ids)
    for config in (checkpoint.config, checkpoint.generation_config):
        named = config.get("eos_token_id")
        for token in named if isinstance(named, list) else [named]:
            if isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= LARGEST_TOKEN_ID:
                ids.add(token)
    return tuple(sorted(ids))
