"""A random mixture of experts on the cpu device: native experts, portable ones, and transformers.

The model has the shape of Qwen3-MoE: 8 layers, 1,024 wide, 32 experts of 768, four for each token, 0.65 billion
numbers in bfloat16. Each engine has a process of its own, and they take turns. Times are the smallest of the
repetitions:
milliseconds a step of decode (with one stream and with 16), and of a prefill of 512 tokens.

    python benchmarks/mixture.py [--threads 2] [--repetitions 3] [--quantization int8]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ENGINES = ("native", "portable", "transformers")
STEPS = 24
PROMPT = 32

Generate = Callable[[list[list[int]], int], None]
"""Generate so many tokens for each prompt."""


def config() -> dict[str, Any]:
    """What makes the model."""
    return {
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": "bfloat16",
    }


def make_model(folder: str) -> None:
    """Write the model to a folder, with a tokenizer of a word for each token."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**config())).save_pretrained(folder)
    words = {f"word{number}": number for number in range(config()["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="word0")).save(os.path.join(folder, "tokenizer.json"))


def start_midspan(folder: str, threads: int, quantization: str | None, portable: bool) -> Generate:
    """Midspan's offline engine."""
    from midspan import LLM, SamplingParams

    llm = LLM(
        model=folder,
        device="cpu",
        dtype="bfloat16",
        device_options={"threads": str(threads)},
        kernels=dict.fromkeys(("route", "experts"), "portable") if portable else {},
        quantization=quantization,
        max_model_len=1024,
    )

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return generate


def start_transformers(folder: str, threads: int) -> Generate:
    """Transformers with a static batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], count: int) -> None:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            network.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
            )

    return generate


def measure(generate: Generate, repetition: int) -> dict[str, float]:
    """Milliseconds of each workload; prompts are new in each repetition, so that no prefix is known."""
    source = random.Random(repetition)

    def seconds(streams: int, prompt: int, count: int) -> float:
        prompts = [[source.randrange(8192) for _ in range(prompt)] for _ in range(streams)]
        began = time.perf_counter()
        generate(prompts, count)
        return time.perf_counter() - began

    def step(streams: int) -> float:
        return (seconds(streams, PROMPT, STEPS + 1) - seconds(streams, PROMPT, 1)) / STEPS * 1000

    return {"decode, 1 stream": step(1), "decode, 16 streams": step(16), "prefill, 512": seconds(1, 512, 1) * 1000}


def child(arguments: argparse.Namespace) -> None:
    """A line (repetition) in, a line of milliseconds out."""
    if arguments.child == "transformers":
        generate = start_transformers(arguments.folder, arguments.threads)
    else:
        portable = arguments.child == "portable"
        generate = start_midspan(arguments.folder, arguments.threads, arguments.quantization, portable)
    generate([[1, 2, 3, 4]], 4)
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(generate, int(line))), flush=True)


class Child:
    """An engine in a process of its own."""

    def __init__(self, engine: str, folder: str, arguments: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--child", engine, "--folder", folder, "--threads", str(arguments.threads)]
        if arguments.quantization and engine == "native":
            command += ["--quantization", arguments.quantization]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()

    def answer(self) -> dict[str, float]:
        """The next line of numbers."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                numbers: dict[str, float] = json.loads(line)
                return numbers
        raise RuntimeError(f"the engine ended with {self.process.wait()}")

    def measure(self, repetition: int) -> dict[str, float]:
        """One repetition of all workloads."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{repetition}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=30)


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--quantization", help="of the native engine alone")
    parser.add_argument("--folder", help="where the model is, or is to be written")
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or temporary
        if not os.path.exists(os.path.join(folder, "config.json")):
            make_model(folder)
        engines = arguments.engines.split(",")
        children = {engine: Child(engine, folder, arguments) for engine in engines}
        results = {
            engine: [children[engine].measure(repetition) for repetition in range(arguments.repetitions)]
            for engine in engines
        }
        for one in children.values():
            one.close()
    for name in results[engines[0]][0]:
        best = {engine: min(result[name] for result in results[engine]) for engine in engines}
        print(f"{name:<20}" + "".join(f"{engine:>14} {milliseconds:9.2f} ms" for engine, milliseconds in best.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
