"""How byte-level vocabularies cut text into words before merging, by the name that GGUF files give the cut.

A vocabulary's merges were learnt on words of a certain shape and give other
tokens on words of another. The patterns are those of the ``tokenizer.json`` that
the models' makers published, in the dialect of the ``tokenizers`` library; the
names are the values of ``tokenizer.ggml.pre``. Knows no vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACES
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",  # noqa: RUF001
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_OLD_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # noqa: RUF001


@dataclass(frozen=True, kw_only=True)
class WordSplit:
    """How one family of vocabularies treats text before its merges apply.

    Attributes:
        patterns: applied one after the other, each cutting what the former left.
        compose: text is brought to Unicode's composed form (NFC) first.
        whole_words_first: a word that is a token as a whole is not merged from pieces.
        begins_text: files that do not say otherwise put the beginning-of-text token first.
    """

    patterns: tuple[str, ...]
    compose: bool = False
    whole_words_first: bool = False
    begins_text: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """The cut, followed by the spelling of bytes as letters."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        ]
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)

    def normalizer(self) -> normalizers.Normalizer | None:
        """What is done to text before it is cut, or None."""
        return normalizers.NFC() if self.compose else None


_FAMILIES: tuple[tuple[str, WordSplit], ...] = (
    (
        "gpt-2 phi-2 gigachat roberta-bpe jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code mpt olmo jais",
        WordSplit(patterns=(_GPT2,)),
    ),
    ("smollm starcoder refact codeshell exaone minerva-7b", WordSplit(patterns=(r"\p{N}", _GPT2))),
    ("command-r", WordSplit(patterns=(r"\p{N}", _GPT2), compose=True)),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        WordSplit(patterns=(_LLAMA3,), whole_words_first=True, begins_text=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe glm4", WordSplit(patterns=(_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen megrez stablelm2 kormo", WordSplit(patterns=(_QWEN2,), compose=True)),
    ("qwen35", WordSplit(patterns=(_QWEN35,), compose=True)),
    ("tekken", WordSplit(patterns=(_TEKKEN,), whole_words_first=True, begins_text=True)),
    ("gpt-4o llama4 kanana2", WordSplit(patterns=(_GPT4O,), whole_words_first=True)),
    ("deepseek-v3 hunyuan-dense", WordSplit(patterns=_DEEPSEEK3)),
    ("deepseek-coder", WordSplit(patterns=_DEEPSEEK_CODER)),
    ("falcon", WordSplit(patterns=_FALCON)),
    ("bloom gpt3-finnish poro-chat", WordSplit(patterns=(_BLOOM,))),
    ("default", WordSplit(patterns=_OLD_DEFAULT)),
)

WORD_SPLITS: Mapping[str, WordSplit] = {name: split for names, split in _FAMILIES for name in names.split()}
"""Name of a cut -> the cut. ``default`` is for files from before the cut had a name."""
