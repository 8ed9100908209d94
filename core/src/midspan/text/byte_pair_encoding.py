"""Tokenizers from a vocabulary: byte-level merges as GPT-2's, and SentencePiece's merges by score.

Sources: Sennrich et al., "Neural machine translation of rare words with subword
units" (2016); Radford et al., "Language models are unsupervised multitask
learners" (2019) for the bytes as letters; Kudo and Richardson, "SentencePiece"
(2018). Knows no file and no special token.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers

from midspan.text.word_splits import WordSplit

SPACE = "▁"
"""How SentencePiece writes a space."""


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], split: WordSplit
) -> tokenizers.Tokenizer:
    """A tokenizer whose tokens are bytes, spelled as letters.

    Args:
        vocabulary: token -> id.
        merges: pairs, the first to be merged first.
        split: how text is cut into words.
    """
    model = models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=split.whole_words_first)
    backend = tokenizers.Tokenizer(model)
    normalizer = split.normalizer()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = split.pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe(
    vocabulary: dict[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    unknown: str | None,
    space_before_text: bool,
    charsmap: bytes = b"",
) -> tokenizers.Tokenizer:
    """A tokenizer that merges characters of the whole text, spaces included, and spells unknown ones in bytes.

    Args:
        vocabulary: token -> id.
        merges: pairs, the first to be merged first.
        unknown: the token for what cannot be spelled, or None.
        space_before_text: a space is put before every text (SentencePiece's dummy prefix).
        charsmap: SentencePiece's compiled normalization, or nothing.
    """
    model = models.BPE(vocab=vocabulary, merges=list(merges), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    undo: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if space_before_text:
        steps.append(normalizers.Prepend(SPACE))
        undo.append(decoders.Strip(content=" ", left=1, right=0))
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(undo)
    return backend


def merges_from_scores(
    pieces: Sequence[str], scores: Sequence[float], mergeable: Sequence[bool]
) -> list[tuple[str, str]]:
    """The merges that a vocabulary with scores stands for: the pair that makes the best piece first.

    Args:
        pieces: by id.
        scores: of each piece; higher is merged sooner.
        mergeable: whether merging may make the piece (it is no control, byte or unknown token).

    Returns:
        Every way of putting a piece together from two others, in order.
    """
    ids = {piece: index for index, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, str, str]] = []
    for piece, score, usable in zip(pieces, scores, mergeable, strict=True):
        if not usable or len(piece) < 2:
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        found += [(-score, -len(left), -len(right), left, right) for left, right in pairs]
    found.sort(key=lambda entry: entry[:3])
    return [(left, right) for _, _, _, left, right in found]
