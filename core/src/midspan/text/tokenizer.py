"""Text to token ids and back, and conversations to text, for one model.

Wraps the ``tokenizers`` library. Knows no request and no device; it runs no code
that comes with a model (a chat template runs in a sandbox). A tokenizer may be
shared between threads.

Invariant: ``decode(ids)`` is the text of the tokens' bytes, joined; the pieces of
``IncrementalDetokenizer`` add up to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from midspan.errors import InvalidRequest, ModelNotFound, TemplateError
from midspan.text.chat_template import ChatTemplate
from midspan.text.token_bytes import BytesRule, bytes_rule
from midspan.text.tokenizer_folder import read_tokenizer_folder
from midspan.text.tokenizer_gguf import read_tokenizer_gguf
from midspan.text.tokenizer_source import TokenizerSource

_KEPT_TEMPLATES = 16
"""Compiled chat templates that are kept; requests may bring their own."""


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a folder in Hugging Face's layout, a file in such a folder, or a ``.gguf`` file.

    Raises:
        ModelNotFound: nothing is there.
        UnsupportedModel: no tokenizer there, or one of an unknown kind.
        CheckpointError: a damaged file.
    """
    if path.is_dir():
        return Tokenizer(read_tokenizer_folder(path))
    if not path.is_file():
        raise ModelNotFound(f"There is no tokenizer at {path}.", remedy="Name a model folder or a .gguf file.")
    if path.suffix == ".gguf":
        return Tokenizer(read_tokenizer_gguf(path))
    return Tokenizer(read_tokenizer_folder(path.parent))


class Tokenizer:
    """One model's tokenizer.

    Attributes:
        vocab_size: number of tokens, added ones included; the model may have more logits.
        bos_token_id: beginning-of-text token, or None.
        eos_token_ids: tokens that end a text.
        special_token_ids: tokens that are no text.
        special_tokens: role -> text, as chat templates see it.
        chat_template: the usual template's source, or None.
        bytes_rule: how tokens become bytes one by one, or None when this tokenizer's do not.
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._backend = source.backend
        self._origin = source.origin
        self._templates = dict(source.chat_templates)
        self._compiled: dict[str, ChatTemplate] = {}
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = source.bos_token_id
        self.eos_token_ids = source.eos_token_ids
        self.special_tokens: Mapping[str, str] = dict(source.special_tokens)
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bytes_rule: BytesRule | None = bytes_rule(self._backend.decoder)

    @property
    def chat_template(self) -> str | None:
        """The usual template's source, or None."""
        return self._templates.get("default")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            add_special_tokens: put the tokens before and after it that the model expects around a text.

        Raises:
            InvalidRequest: the text has lone surrogates, which no encoding has room for.
        """
        # A batch of one: the library lets other threads run during a batch, and during a single text it does not.
        try:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequest(
                "The text has characters that are not valid Unicode (lone surrogates).", parameter="prompt"
            ) from error
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, continues_text: bool = False) -> str:
        """Text of token ids.

        Bytes that are no UTF-8 become U+FFFD; ids outside of the vocabulary become nothing.

        Args:
            ids: tokens.
            skip_special_tokens: leave special tokens out.
            continues_text: the text goes on from something, so a space that begins it is kept
                even where the tokenizer puts one before every text.
        """
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_token_ids]
        rule = self.bytes_rule
        if rule is None:
            text: str = self._backend.decode(list(ids), skip_special_tokens=False)
            return text
        text = b"".join([self.token_bytes(token_id) for token_id in ids]).decode(errors="replace")
        for _ in range(0 if continues_text else rule.strip_count):
            text = text.removeprefix(rule.strip)
        return text

    def longest_token(self) -> int | None:
        """Characters of the longest token; None where nothing is known of how tokens are spelled."""
        if self.bytes_rule is None:
            return None
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, wherever it stands; nothing for an id outside of the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """Text of one token alone; U+FFFD stands for part of a character."""
        return self.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation; encode it with ``add_special_tokens=False``.

        Args:
            messages: in OpenAI's shape: role, content (text or text parts), tool calls.
            add_generation_prompt: end where the model's answer begins.
            continue_final_message: end within the last message, for the model to go on with it.
            tools: in OpenAI's shape.
            template: Jinja source, or the name of one of the model's templates; None: its own.
            variables: further values for the template.

        Raises:
            TemplateError: no template, or it failed.
            InvalidRequest: messages of another shape.
        """
        return self._template(template, bool(tools)).render(
            messages,
            special_tokens=self.special_tokens,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            variables=variables,
        )

    def _template(self, wanted: str | None, with_tools: bool) -> ChatTemplate:
        usual = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        source = self._templates.get(usual if wanted is None else wanted, wanted)
        if source is None:
            raise TemplateError(
                f"The tokenizer of {self._origin} has no chat template.",
                remedy="Give one with --chat-template, or use completions instead of chat.",
                parameter="messages",
            )
        compiled = self._compiled.get(source)
        if compiled is None:
            if len(self._compiled) >= _KEPT_TEMPLATES:
                self._compiled.pop(next(iter(self._compiled)), None)
            compiled = self._compiled[source] = ChatTemplate(source)
        return compiled

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < 1 << 32:
            return b""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.bytes_rule is not None:
            return self.bytes_rule.bytes_of(token)
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text.encode()
