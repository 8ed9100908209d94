"""One engine in a process of its own, told what to run over its standard input.

Run by the interpreter of the environment that holds the engine, so it needs nothing
beside the engine itself. A line ``[workload, repetition]`` comes in, a line
``{"seconds": ..., "tokens": ...}`` goes out; the first line that goes out tells how long
the engine took to start.

    python engine_child.py ENGINE --model FOLDER [--tokenizer FOLDER] [--dtype bfloat16] [--threads 2] ...
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

from workloads import WORKLOADS, Request

Run = Callable[[list[Request]], list[int]]
"""Runs requests all at once; returns how many tokens each got."""


def start_midspan(arguments: argparse.Namespace) -> Run:
    """Midspan's offline engine."""
    from midspan import LLM, SamplingParams

    llm = LLM(
        model=arguments.model,
        tokenizer=arguments.tokenizer or arguments.model,
        device="cpu",
        dtype=arguments.dtype,
        quantization=arguments.quantization or None,
        device_options={"threads": str(arguments.threads)},
        max_num_seqs=64,
    )

    def run(requests: list[Request]) -> list[int]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for _, count in requests]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run


def start_transformers(arguments: argparse.Namespace) -> Run:
    """transformers' ``generate`` on static left-padded batches of 16, each run to its longest output."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(arguments.threads)
    network = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()

    def batch(requests: list[Request]) -> None:
        longest = max(len(ids) for ids, _ in requests)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(requests):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        count = max(output for _, output in requests)
        lengths = {"max_new_tokens": count, "min_new_tokens": count}
        with torch.inference_mode():
            network.generate(tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)

    def run(requests: list[Request]) -> list[int]:
        for begin in range(0, len(requests), 16):
            batch(requests[begin : begin + 16])
        return [count for _, count in requests]

    return run


def start_vllm(arguments: argparse.Namespace) -> Run:
    """vLLM's offline engine, with room for 2 GiB of KV cache and the processors bound as its documents advise."""
    processors = ",".join(map(str, sorted(os.sched_getaffinity(0))[: arguments.threads]))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", processors)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    options = {"quantization": arguments.quantization} if arguments.quantization else {}
    llm = LLM(
        model=arguments.model,
        dtype=arguments.dtype,
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching=True,
        **options,
    )

    def run(requests: list[Request]) -> list[int]:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for _, count in requests]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run


def start_openvino(arguments: argparse.Namespace) -> Run:
    """OpenVINO GenAI's continuous batching, on a model that ``optimum-cli export openvino`` made."""
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2
    scheduler.enable_prefix_caching = True
    scheduler.max_num_batched_tokens = 4096
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        arguments.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": arguments.threads}
    )

    def config(count: int) -> object:
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens = wanted.min_new_tokens = count
        wanted.ignore_eos = True
        wanted.do_sample = False
        return wanted

    def run(requests: list[Request]) -> list[int]:
        prompts = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids, _ in requests]
        outputs = pipeline.generate(prompts, [config(count) for _, count in requests])
        return [len(output.m_generation_ids[0]) for output in outputs]

    return run


def start_llama_cpp(arguments: argparse.Namespace) -> Run:
    """llama.cpp through its Python package, one request after the other: it has no batching there."""
    from llama_cpp import Llama

    threads = {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    llama = Llama(arguments.model, n_ctx=2048, n_batch=1024, n_ubatch=512, verbose=False, **threads)

    def run(requests: list[Request]) -> list[int]:
        for ids, count in requests:
            for made, _ in enumerate(llama.generate(ids, temp=0.0, top_k=1, reset=True), start=1):
                if made >= count:
                    break
        return [count for _, count in requests]

    return run


STARTS: dict[str, Callable[[argparse.Namespace], Run]] = {
    "midspan": start_midspan,
    "transformers": start_transformers,
    "vllm": start_vllm,
    "openvino": start_openvino,
    "llama.cpp": start_llama_cpp,
}


def timed(run: Run, requests: list[Request]) -> float:
    """Seconds that the requests take together.

    Raises:
        RuntimeError: an output has another length than was asked for.
    """
    began = time.perf_counter()
    lengths = run(requests)
    seconds = time.perf_counter() - began
    if lengths != [count for _, count in requests]:
        raise RuntimeError(f"outputs of {lengths} tokens")
    return seconds


def answer(run: Run, name: str, repetition: int) -> dict[str, float]:
    """Run one repetition of a workload; a negative one is a short warm-up.

    For ``decode`` also ``token_ms``, what each further token takes: another prompt with one token out is subtracted.
    """
    requests = WORKLOADS[name](repetition)
    if repetition < 0:
        requests = [(ids, min(count, 8)) for ids, count in requests[:8]]
    found: dict[str, float] = {"tokens": sum(count for _, count in requests)}
    if name == "decode":
        alone = timed(run, [(ids, 1) for ids, _ in WORKLOADS[name](1000 + repetition)])
        found["seconds"] = timed(run, requests)
        found["token_ms"] = (found["seconds"] - alone) / max(1, requests[0][1] - 1) * 1000
    else:
        found["seconds"] = timed(run, requests)
    return found


def main() -> int:
    """Start the engine and serve the measurements that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=STARTS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # engines print to standard output as they like
    os.dup2(2, 1)
    began = time.perf_counter()
    run = STARTS[arguments.engine](arguments)
    timed(run, [([1000] * 8, 2)])
    print(json.dumps({"start": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(run, *json.loads(line))), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
