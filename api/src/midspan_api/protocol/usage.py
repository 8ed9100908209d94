"""Token counts of a reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midspan.engine.outputs import RequestOutput


@dataclass(kw_only=True)
class Usage:
    """Counts over all prompts and completions of one HTTP request, so far.

    Attributes:
        prompt_tokens: tokens of the prompts, each prompt once.
        cached_tokens: those of them taken from the prefix cache.
        completion_tokens: generated tokens.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def start(self, output: RequestOutput) -> None:
        """Count a prompt; called with its first output."""
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens

    def add(self, output: RequestOutput) -> None:
        """Count the new tokens of an output."""
        for completion in output.outputs:
            self.completion_tokens += len(completion.token_ids)

    def json_object(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
