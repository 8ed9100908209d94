"""Tiny tokenizers of the kinds that models bring, in folders as publishers lay them out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from midspan.text.tokenizer import Tokenizer, load_tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "Hello world, this is a text about tokens; it is 2024 and 3.14159 is not 22/7!",
    "Grüße aus München, où est la bibliothèque? Привет, мир. 你好，世界。 नमस्ते दुनिया",  # noqa: RUF001
    "def f(x):\n    return x  # 😀 👩‍👩‍👧‍👦 🇩🇪\n\n\n\tdone",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]


def bare_trainer(vocabulary: int, **options: Any) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, show_progress=False, **options)


def byte_level_backend() -> tokenizers.Tokenizer:
    """As GPT-2's: tokens are bytes, spelled as letters."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, bare_trainer(420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("«é»", normalized=False)])
    return backend


def sentencepiece_backend() -> tokenizers.Tokenizer:
    """As Llama 2's: tokens are characters with marked spaces, others are spelled in byte tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS[:2], bare_trainer(200))
    model = json.loads(trained.to_str())["model"]
    listed = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), SPECIAL[3]]
    listed += [token for token in model["vocab"] if token not in SPECIAL]
    merges = [(left, right) for left, right in model["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(listed)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return backend


def word_piece_backend() -> tokenizers.Tokenizer:
    """A decoder in which a token's text depends on its neighbours."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    return backend


CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "unk_token": "<unk>"}

MakeFolder = Callable[..., Path]


def write_folder(folder: Path, backend: tokenizers.Tokenizer | None, files: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write a model folder: ``make_folder("byte_level", {"tokenizer_config.json": {...}})``."""
    backends = {
        "byte_level": byte_level_backend,
        "sentencepiece": sentencepiece_backend,
        "word_piece": word_piece_backend,
        "none": lambda: None,
    }

    def make(kind: str, files: Mapping[str, object] | None = None) -> Path:
        return write_folder(tmp_path / kind, backends[kind](), {"tokenizer_config.json": CONFIG, **(files or {})})

    return make


def _loaded(factory: pytest.TempPathFactory, kind: str, backend: tokenizers.Tokenizer) -> Tokenizer:
    return load_tokenizer(write_folder(factory.mktemp(kind), backend, {"tokenizer_config.json": CONFIG}))


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level tokenizer with special and plain added tokens."""
    return _loaded(tmp_path_factory, "byte_level", byte_level_backend())


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer with byte fallback and a space before every text."""
    return _loaded(tmp_path_factory, "sentencepiece", sentencepiece_backend())


@pytest.fixture(scope="session")
def word_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose tokens have no bytes of their own."""
    return _loaded(tmp_path_factory, "word_piece", word_piece_backend())


@pytest.fixture(scope="session")
def published() -> Mapping[str, tokenizers.Tokenizer]:
    """The same by kind, as the library alone has them."""
    return {
        "byte_level": byte_level_backend(),
        "sentencepiece": sentencepiece_backend(),
        "word_piece": word_piece_backend(),
    }
