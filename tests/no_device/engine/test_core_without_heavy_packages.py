"""The whole engine on the reference device, in an interpreter where torch and its like cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from midspan import LLM, SamplingParams

PROGRAM = """
import json, sys

BLOCKED = ("torch", "jax", "transformers", "fastapi", "typer", "safetensors", "gguf")

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())

from midspan import LLM, SamplingParams

params = [SamplingParams(temperature=0, max_tokens=8), SamplingParams(seed=5, max_tokens=8, n=2)]
with LLM(sys.argv[1], device="reference", kv_cache_memory_bytes=4 * 2**20, block_size=4) as llm:
    outputs = llm.generate(["the fox", "a tale"], params, use_tqdm=False)
print(json.dumps([[list(choice.token_ids) for choice in output.outputs] for output in outputs]))
"""


def test_the_core_generates_without_torch(tiny_model: Path, tiny_llm: LLM) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    params = [SamplingParams(temperature=0, max_tokens=8), SamplingParams(seed=5, max_tokens=8, n=2)]
    expected = tiny_llm.generate(["the fox", "a tale"], params, use_tqdm=False)
    assert json.loads(done.stdout) == [[list(choice.token_ids) for choice in output.outputs] for output in expected]
