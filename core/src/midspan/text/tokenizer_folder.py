"""Tokenizers out of a folder in Hugging Face's layout.

Reads ``tokenizer.json``, or else ``vocab.json`` with ``merges.txt``, or else
SentencePiece's ``tokenizer.model``; and beside them ``tokenizer_config.json``,
``special_tokens_map.json``, ``added_tokens.json``, ``generation_config.json``,
``config.json`` (end tokens only) and the chat template files. Knows no weights
and runs no code from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import tokenizers
from tokenizers import processors

from midspan.errors import CheckpointError, UnsupportedModel
from midspan.text import sentencepiece_model as spm
from midspan.text.byte_pair_encoding import byte_level_bpe, merges_from_scores, sentencepiece_bpe
from midspan.text.tokenizer_source import TokenizerSource, add_whole_tokens, surround_texts
from midspan.text.word_splits import WORD_SPLITS

_DOWNLOAD_AGAIN = "The file is damaged or was not downloaded completely: download it again."
_NO_TOKENIZER = (
    "Add the model's tokenizer.json to the folder (AutoTokenizer.from_pretrained(...).save_pretrained(...) of "
    "transformers writes one), or name a folder that has one with --tokenizer."
)
LARGEST_TOKEN_ID = 2**31 - 1
_SPLIT_OF_CLASS = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
"""Tokenizer class in tokenizer_config.json -> how its vocab.json and merges.txt cut words."""


def read_tokenizer_folder(folder: Path) -> TokenizerSource:
    """Read a tokenizer from a folder.

    Raises:
        UnsupportedModel: there is no tokenizer in it, or none of a known kind.
        CheckpointError: a file is damaged.
    """
    config = _json_object(folder / "tokenizer_config.json")
    backend = _backend(folder, config)
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(folder, config)
    _surround(backend, config, special)
    return TokenizerSource(
        origin=str(folder),
        backend=backend,
        bos_token_id=_token_id(backend, special.get("bos_token")),
        eos_token_ids=_eos_token_ids(folder, backend, special),
        special_tokens=special,
        chat_templates=_chat_templates(folder, config),
    )


def _backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    if (folder / "tokenizer.json").is_file():
        return _published_backend(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _byte_level_backend(folder, config)
    elif (folder / "tokenizer.model").is_file():
        backend = _sentencepiece_backend(folder / "tokenizer.model")
    else:
        raise UnsupportedModel(f"{folder} has no tokenizer.", remedy=_NO_TOKENIZER)
    _add_listed_tokens(backend, folder, config)
    return backend


def _published_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
        raise CheckpointError(f"{path} cannot be read: {error}.", remedy=_DOWNLOAD_AGAIN) from error


def _byte_level_backend(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocabulary = _json_object(folder / "vocab.json")
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'merges.txt'} cannot be read: {error}.", remedy=_DOWNLOAD_AGAIN) from error
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    class_name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    split = WORD_SPLITS[_SPLIT_OF_CLASS.get(class_name, "gpt-2")]
    try:
        return byte_level_bpe(vocabulary, merges, split)
    except Exception as error:  # as above
        raise CheckpointError(
            f"vocab.json and merges.txt in {folder} do not fit together: {error}.", remedy=_DOWNLOAD_AGAIN
        ) from error


def _sentencepiece_backend(path: Path) -> tokenizers.Tokenizer:
    model = spm.read_sentencepiece_model(path)
    if model.kind != spm.BPE:
        raise UnsupportedModel(
            f"{path} is a SentencePiece model of kind {model.kind}; only pair merging (kind {spm.BPE}) is read.",
            remedy=_NO_TOKENIZER,
        )
    mergeable = [kind in (spm.NORMAL, spm.USER_DEFINED) for kind in model.types]
    backend = sentencepiece_bpe(
        {piece: index for index, piece in enumerate(model.pieces)},
        merges_from_scores(model.pieces, model.scores, mergeable),
        unknown=None if model.unknown_id is None else model.pieces[model.unknown_id],
        space_before_text=model.space_before_text,
        charsmap=model.charsmap,
    )
    typed = list(zip(model.pieces, model.types, strict=True))
    add_whole_tokens(
        backend,
        [piece for piece, kind in typed if kind in (spm.CONTROL, spm.UNKNOWN)],
        [piece for piece, kind in typed if kind == spm.USER_DEFINED],
    )
    return backend


def _add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that stand beside the vocabulary, in the order of their ids, which the library gives out in turn."""
    listed: dict[int, tuple[str, bool]] = {}
    for text, token_id in _json_object(folder / "added_tokens.json").items():
        listed[int(token_id)] = (text, False)
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        listed[int(token_id)] = (_token_text(token) or "", bool(isinstance(token, dict) and token.get("special")))
    for token_id, (text, is_special) in sorted(listed.items()):
        add_whole_tokens(backend, [text] if is_special else [], [] if is_special else [text])
        given = backend.token_to_id(text)
        if given != token_id:
            raise CheckpointError(
                f"The added token {text!r} of {folder} should have id {token_id} but comes to {given}.",
                remedy=_NO_TOKENIZER,
            )
    named = [_token_text(token) for key, token in config.items() if key.endswith("_token")]
    add_whole_tokens(backend, [text for text in named if text and backend.token_to_id(text) is not None], [])


def _surround(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Follow ``add_bos_token`` and ``add_eos_token``, unless tokenizer.json itself says what surrounds a text."""
    if isinstance(backend.post_processor, processors.TemplateProcessing):
        return
    wanted = [special.get(f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos")]
    before, after = (text if text and backend.token_to_id(text) is not None else None for text in wanted)
    if before or after:
        surround_texts(backend, before, after)


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text, from ``special_tokens_map.json`` and, first, ``tokenizer_config.json``."""
    merged = {**_json_object(folder / "special_tokens_map.json"), **config}
    found = {key: _token_text(value) for key, value in merged.items() if key.endswith("_token")}
    return {key: text for key, text in found.items() if text is not None}


def _token_text(value: object) -> str | None:
    """A token written as a string or as ``{"content": ...}``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _token_id(backend: tokenizers.Tokenizer, text: str | None) -> int | None:
    token_id: int | None = None if text is None else backend.token_to_id(text)
    return token_id


def _eos_token_ids(folder: Path, backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    ids = [_token_id(backend, special.get("eos_token"))]
    listed = _json_object(folder / "generation_config.json").get("eos_token_id")
    if listed is None and ids == [None]:
        listed = _json_object(folder / "config.json").get("eos_token_id")
    ids += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(token_id for token_id in ids if _is_token_id(token_id)))


def _is_token_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_TOKEN_ID


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Named templates; a file of its own goes before the configuration's."""
    found: dict[str, str] = {}
    listed = config.get("chat_template")
    if isinstance(listed, str):
        found["default"] = listed
    elif isinstance(listed, list):
        found |= {str(entry["name"]): str(entry["template"]) for entry in listed if "template" in entry}
    in_json = _json_object(folder / "chat_template.json").get("chat_template")
    if isinstance(in_json, str):
        found["default"] = in_json
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    for name, path in files.items():
        try:
            found[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.", remedy=_DOWNLOAD_AGAIN) from error
    return found


def _json_object(path: Path) -> dict[str, Any]:
    """The object in a file; nothing where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", remedy=_DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", remedy=_DOWNLOAD_AGAIN)
    return content
