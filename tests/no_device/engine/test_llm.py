"""The offline class, as the quick start uses it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midspan import (
    LLM,
    CacheTooSmall,
    EngineDead,
    EngineSettings,
    InvalidRequest,
    ModelNotFound,
    SamplingParams,
    SettingsError,
)
from midspan.devices.discovery import DeviceCatalogue
from midspan.engine.model_text import load_model_text
from midspan.engine.progress import ProgressLine
from midspan.engine.status import StartupPhase
from midspan.errors import CheckpointError, TemplateError, UnsupportedModel

MakeLLM = Callable[..., LLM]


def test_the_quick_start_works(tiny_model: Path) -> None:
    prompts = ["the quick brown", "a tale of", "to be or"]
    with LLM(model=str(tiny_model), device="reference", max_model_len=64, gpu_memory_utilization=0.01) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95))
        assert [output.prompt for output in outputs] == prompts
        for output in outputs:
            assert len(output.outputs[0].token_ids) == 16 or output.outputs[0].finish_reason == "stop"
            assert isinstance(output.outputs[0].text, str)
            assert output.finished
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("the")


def test_prompts_come_as_text_ids_mappings_and_lists_of_these(tiny_llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4)
    ids = tiny_llm.get_tokenizer().encode("the quick")
    forms: list[Any] = [
        "the quick",
        ids,
        {"prompt": "the quick"},
        {"prompt_token_ids": ids},
    ]
    whole = tiny_llm.generate(forms, params)
    assert len({tuple(output.outputs[0].token_ids) for output in whole}) == 1
    for form in forms:
        (output,) = tiny_llm.generate(form, params)
        assert output.prompt_token_ids == ids
    assert tiny_llm.generate([], params) == []
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        tiny_llm.generate({"text": "the"}, params)


def test_one_bad_prompt_is_refused_before_anything_runs(tiny_llm: LLM) -> None:
    before = tiny_llm.statistics()
    for bad in ("", [999], [1] * 300, "\ud800"):
        with pytest.raises(InvalidRequest):
            tiny_llm.generate(["the quick", bad])
    assert tiny_llm.statistics() == before


@pytest.mark.parametrize("prompts", [None, 5, b"the", [None], [1.5], {"prompt": 5}, {"prompt": None}, [b"the"], [{5}]])
def test_prompts_of_no_known_shape_are_refused(tiny_llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tiny_llm.generate(prompts)
    assert (caught.value.parameter, bool(caught.value.remedy)) == ("prompt", True)


@pytest.mark.parametrize("messages", [None, 5, "hi", [5], ["hi"], [[5]], [[{"role": "user", "content": "a"}], "hi"]])
def test_conversations_of_no_known_shape_are_refused(tiny_llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="A conversation must be a list of messages") as caught:
        tiny_llm.chat(messages)
    assert caught.value.parameter == "messages"


@pytest.mark.parametrize("given", [{"temperature": 0}, 5, [5], "x"])
def test_parameters_must_be_of_their_class(tiny_llm: LLM, given: Any) -> None:
    with pytest.raises(InvalidRequest, match="sampling_params must be SamplingParams") as caught:
        tiny_llm.generate("the", given)
    assert caught.value.parameter == "sampling_params"


def test_parameters_are_given_once_or_for_each_prompt(tiny_llm: LLM) -> None:
    outputs = tiny_llm.generate(["a", "b"], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3, n=2)])
    assert [[len(one.token_ids) for one in output.outputs] for output in outputs] == [[2], [3, 3]]
    with pytest.raises(InvalidRequest, match="2 prompts and 1 sampling"):
        tiny_llm.generate(["a", "b"], [SamplingParams()])


def test_a_fresh_engine_of_the_same_seed_generates_the_same_and_one_of_another_does_not(make_llm: MakeLLM) -> None:
    params = SamplingParams(max_tokens=12)
    found = [
        [output.outputs[0].token_ids for output in make_llm(seed=seed).generate(["the", "the"], params)]
        for seed in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_chat_renders_the_models_template_and_answers(tiny_llm: LLM) -> None:
    conversation = [{"role": "user", "content": "the fox"}]
    params = SamplingParams(temperature=0.0, max_tokens=5)
    (output,) = tiny_llm.chat(conversation, params)
    assert output.prompt == "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = tiny_llm.get_tokenizer()
    assert output.prompt_token_ids == tokenizer.encode(output.prompt, add_special_tokens=False)
    both = tiny_llm.chat([conversation, conversation], params)
    assert [one.outputs[0].token_ids for one in both] == [output.outputs[0].token_ids] * 2
    (other,) = tiny_llm.chat(conversation, params, chat_template="{{ messages[0].content }}")
    assert other.prompt == "the fox"
    with pytest.raises(TemplateError):
        tiny_llm.chat(conversation, params, chat_template="{{ unclosed")


def test_stop_strings_end_the_text_and_free_the_request(tiny_llm: LLM) -> None:
    params = SamplingParams(max_tokens=60, seed=5, ignore_eos=True)
    text = tiny_llm.generate("the", params)[0].outputs[0].text
    place = next(place for place in range(10, len(text) - 3) if "\ufffd" not in text[place : place + 2])
    stop = text[place : place + 2]
    output = tiny_llm.generate("the", params.replace(stop=[stop]))[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.text == text[: text.index(stop)]
    assert len(output.token_ids) < 60
    assert tiny_llm.statistics().blocks_in_use == 0


def test_defaults_come_from_the_models_generation_config(write_model: Any, make_llm: MakeLLM) -> None:
    folder = write_model(generation_config={"temperature": 0.0, "max_new_tokens": 3, "eos_token_id": 77})
    llm = make_llm(model=folder)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
    assert len(llm.generate("the")[0].outputs[0].token_ids) <= 3


def test_every_end_token_of_the_configs_ends_a_text(write_model: Any, make_llm: MakeLLM, tiny_llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    ids = tiny_llm.generate("the", greedy)[0].outputs[0].token_ids
    llm = make_llm(model=write_model(generation_config={"eos_token_id": [1, ids[3]]}))
    output = llm.generate("the", greedy.replace(ignore_eos=False))[0].outputs[0]
    assert output.token_ids == ids[: ids.index(ids[3]) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


@pytest.mark.parametrize("ids", [-3, 10**30, "x", [[1]], [True], {"a": 1}, [5, -1, 2**40]])
def test_end_tokens_that_are_no_ids_are_left_out(write_model: Any, ids: Any, tiny_llm: LLM) -> None:
    text = load_model_text(EngineSettings(model="m"), write_model(generation_config={"eos_token_id": ids}))
    assert set(text.eos_token_ids) - {5} <= set(tiny_llm.get_tokenizer().eos_token_ids) | {1, 2}
    assert all(0 <= token < 320 for token in text.eos_token_ids)


def test_a_call_that_is_interrupted_leaves_nothing_behind(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(3))

    def show(self: ProgressLine, done: int, tokens: int) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ProgressLine, "show", show)
        with pytest.raises(KeyboardInterrupt):
            tiny_llm.generate(["the", "a"], SamplingParams(max_tokens=50, ignore_eos=True))
    statistics = tiny_llm.statistics()
    assert (statistics.running, statistics.waiting, statistics.blocks_in_use) == (0, 0, 0)


def test_progress_is_shown_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, enabled, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        line = ProgressLine(4, enabled=enabled, stream=stream)
        line._shown -= 10
        line.show(3, 50)
        line.close()
        assert ("3/4" in stream.getvalue()) is shown


# ---- loading


def test_phases_of_the_loading_are_reported(tiny_model: Path, reference_only: DeviceCatalogue) -> None:
    phases: list[StartupPhase] = []
    LLM(str(tiny_model), catalogue=reference_only, max_model_len=32, report=phases.append).close()
    names = list(dict.fromkeys(phase.name for phase in phases))
    assert names == ["checkpoint", "device", "graph", "compile", "weights", "cache", "warm-up"]
    weights = [phase for phase in phases if phase.name == "weights"]
    assert weights[-1].done == weights[-1].total
    assert any("reference" in phase.detail for phase in phases if phase.name == "device")


def test_the_model_is_described(tiny_llm: LLM) -> None:
    model = tiny_llm.model
    assert (model.architecture, model.device, model.dtype) == ("LlamaForCausalLM", "reference", "float32")
    assert (model.max_model_len, model.vocab_size, model.block_size) == (256, 320, 4)
    assert model.cache_bytes <= 4 * 2**20
    assert model.weights_bytes > 0
    assert "attention" in model.placement


def test_a_context_that_does_not_fit_is_lowered_with_a_notice_and_refused_when_asked_for(make_llm: MakeLLM) -> None:
    phases: list[StartupPhase] = []
    llm = make_llm(blocks=21, report=phases.append)
    assert llm.model.max_model_len == 80
    assert any("lowered from 256 to 80" in phase.detail for phase in phases)
    with pytest.raises(CacheTooSmall, match="at most 80 tokens"):
        make_llm(blocks=21, max_model_len=100)
    assert len(llm.generate([[5] * 40], SamplingParams(max_tokens=None, ignore_eos=True))[0].outputs[0].token_ids) == 40


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_model_len": 1000}, "256 positions"),
        ({"block_size": 5}, "block_size=5"),
        ({"kv_cache_dtype": "int1"}, "kv_cache_dtype=int1"),
        ({"dtype": "float8"}, "float8"),
        ({"kernels": {"attention": "magic"}}, "magic"),
    ],
)
def test_settings_that_the_device_or_model_cannot_serve_are_refused(
    make_llm: MakeLLM, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        make_llm(**settings)


@pytest.mark.parametrize(
    ("published", "asked", "taken"),
    [("float32", "auto", "float32"), ("bfloat16", "auto", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_the_activation_type_is_the_published_one_unless_asked_otherwise(
    write_model: Any, make_llm: MakeLLM, published: str, asked: str, taken: str
) -> None:
    llm = make_llm(model=write_model(torch_dtype=published), dtype=asked)
    assert (llm.model.dtype, llm.model.cache_dtype) == (taken, taken)
    assert len(llm.generate("the", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize(("asked", "taken"), [("fp8", "float8_e4m3"), ("fp8_e4m3", "float8_e4m3"), ("int8", "int8")])
def test_a_cache_of_8_bits_serves_under_each_of_its_names(make_llm: MakeLLM, asked: str, taken: str) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    llm = make_llm(kv_cache_dtype=asked, enable_prefix_caching=False)
    assert llm.model.cache_dtype == taken
    alone = llm.generate([[5, 6, 7]], params)[0].outputs[0].token_ids
    together = llm.generate([[9] * 30, [5, 6, 7], [4]], params)
    assert together[1].outputs[0].token_ids == alone
    assert len(alone) == 12


def test_a_model_with_a_sliding_window_runs_in_bounded_blocks(write_model: Any, make_llm: MakeLLM) -> None:
    folder = write_model(architectures=["MistralForCausalLM"], sliding_window=16)
    llm = make_llm(model=folder, max_num_batched_tokens=16, max_num_seqs=2)
    core = llm._core
    assert core is not None
    outputs = llm.generate([[9] * 100], SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True, logprobs=0))
    assert len(outputs[0].outputs[0].token_ids) == 100
    usage = core.scheduler.statistics().blocks
    # Two requests of a window of 16 and a step of 16 tokens: 9 blocks of 4 each.
    assert all(group.total <= 18 for group in usage.values())


def test_files_that_are_missing_or_damaged_are_named(
    write_model: Any, tmp_path: Path, reference_only: DeviceCatalogue
) -> None:
    with pytest.raises(ModelNotFound):
        LLM(str(tmp_path / "nowhere"), catalogue=reference_only)
    half = write_model()
    weights = half / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(half), catalogue=reference_only)
    missing = write_model(num_hidden_layers=2)
    config = json.loads((missing / "config.json").read_text())
    (missing / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2"):
        LLM(str(missing), catalogue=reference_only)
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM"):
        LLM(str(write_model(architectures=["DreamForCausalLM"])), catalogue=reference_only)
