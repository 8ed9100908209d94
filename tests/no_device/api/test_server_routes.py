"""Models, tokenization, health and metrics."""

from __future__ import annotations

from typing import Any

import openai
import pytest

OPEN = ["/livez", "/readyz", "/health", "/ping", "/version"]


def test_models_are_listed_and_found_by_name_even_with_a_slash(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "team/tiny"]
    card = client.models.retrieve("team/tiny")
    assert card.id == "team/tiny"
    assert card.max_model_len == 4096  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("team/other")


def test_tokens_go_there_and_back(server: Any) -> None:
    text = "naïve café, 東京 🎉"
    made = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 4096
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json() == {"prompt": text}


def test_messages_are_tokenized_as_the_chat_route_does(server: Any) -> None:
    messages = [{"role": "user", "content": "a tale"}]
    tokens = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    body = {"messages": messages, "max_tokens": 1, "return_token_ids": True}
    assert server.post("/v1/chat/completions", body).json()["prompt_token_ids"] == tokens


def test_a_long_text_is_tokenized_the_same_way(server: Any) -> None:
    text = "the lazy dog " * 5000
    tokens = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == text


@pytest.mark.parametrize("body", [{}, {"prompt": "a", "messages": []}, {"prompt": 5}])
def test_tokenize_refuses_what_it_cannot_read(server: Any, body: dict[str, Any]) -> None:
    assert server.post("/tokenize", body).status_code == 400


@pytest.mark.parametrize("tokens", [[320], [-1], ["a"], None])
def test_detokenize_refuses_ids_outside_the_vocabulary(server: Any, tokens: Any) -> None:
    answer = server.post("/detokenize", {"tokens": tokens})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tokens"


@pytest.mark.parametrize("path", OPEN)
def test_health_routes_answer(server: Any, path: str) -> None:
    assert server.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/version", "/metrics"])
def test_health_routes_answer_a_load_balancer_that_asks_for_the_head_only(server: Any, path: str) -> None:
    answer = server.http.head(server.url + path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_model_is_served_under_the_name_of_its_folder_as_well(start_server: Any, served_model: Any) -> None:
    server = start_server(served_model_names=())
    names = [str(served_model), served_model.name]
    with server.client() as client:
        assert [model.id for model in client.models.list()] == names
        for name in names:
            assert client.completions.create(model=name, prompt="a", max_tokens=1).model == name


def test_no_documentation_page_loads_from_elsewhere(server: Any) -> None:
    assert server.get("/docs").status_code == 404
    assert server.get("/redoc").status_code == 404


DASHBOARD_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prompt_tokens_total",
    "generation_tokens_total",
    "prompt_tokens_cached_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "request_success_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_sum",
    "request_inference_time_seconds_sum",
    "request_prefill_time_seconds_sum",
    "request_decode_time_seconds_sum",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_sum",
    "request_params_n_sum",
    "request_params_max_tokens_sum",
    "cache_config_info",
]
OLDER_NAMES = ["time_per_output_token_seconds_bucket", "gpu_cache_usage_perc", "gpu_prefix_cache_hits_total"]


def samples(server: Any) -> dict[str, float]:
    """Metric lines: name with labels -> value."""
    lines = [line for line in server.get("/metrics").text.splitlines() if line and not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_have_the_names_that_dashboards_read_under_both_prefixes(server: Any, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="a", max_tokens=3)
    names = {key.partition("{")[0] for key in samples(server)}
    assert {f"midspan:{name}" for name in DASHBOARD_NAMES} <= names
    assert {f"vllm:{name}" for name in DASHBOARD_NAMES + OLDER_NAMES} <= names


def test_metrics_count_what_happened(start_server: Any) -> None:
    fresh = start_server()
    with fresh.client() as client:
        for _ in range(3):
            client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=[100000])
    fresh.wait_until(fresh.nothing_is_held)
    fresh.get("/some/client/chosen/path")
    found = samples(fresh)

    def value(name: str, **labels: str) -> float:
        wanted = [f'{key}="{text}"' for key, text in labels.items()]
        return sum(v for k, v in found.items() if k.partition("{")[0] == name and all(part in k for part in wanted))

    assert value("vllm:generation_tokens_total") == 12
    assert value("vllm:prompt_tokens_total") == 9
    assert value("vllm:request_success_total", finished_reason="length") == 3
    assert value("midspan:time_to_first_token_seconds_count") == 3
    assert value("midspan:inter_token_latency_seconds_count") == 9
    assert value("midspan:request_params_max_tokens_sum") == 12
    assert value("midspan:http_requests_total", route="/v1/completions", code="200") == 3
    assert value("midspan:http_requests_total", route="/v1/completions", code="400") == 1
    assert value("midspan:admission_rejections_total", reason="invalid_value") == 1
    assert value("midspan:http_requests_total", route="unmatched", code="404") == 1
    assert not any("client" in key for key in found)
    assert value("midspan:engine_up") == 1


def test_the_second_set_of_names_can_be_left_out(start_server: Any) -> None:
    plain = start_server(vllm_metric_names=False)
    assert not any(key.startswith("vllm:") for key in samples(plain))


def test_the_model_name_stands_on_every_metric(server: Any) -> None:
    assert all('model_name="tiny"' in key for key in samples(server))


def test_the_description_of_the_interface_lists_every_route_with_its_fields(server: Any) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/metrics"} <= set(paths)
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"prompt", "max_tokens", "stream_options"} <= set(schema["properties"])
    assert schema["required"] == ["prompt"]
