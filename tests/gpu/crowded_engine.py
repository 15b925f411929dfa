"""One engine with a KV cache of so many blocks, and the same requests every time. test_engines_cuda.py runs it in a
process of its own, with a file of JSON that says how."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(
    0, str(Path(__file__).parents[2])
)  # a script's own folder comes first: add `benchmarks`

from benchmarks.offline import OfflineEngine, random_prompt

NUM_REQUESTS = 24
PROMPT_TOKENS = (200, 900)
OUTPUT_TOKENS = 120


def main(job: dict[str, Any]) -> None:
    engine = OfflineEngine(
        job["model"],
        job["transfer"],
        num_gpu_blocks_override=job["num_blocks"],
        max_model_len=4_096,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
    )
    draw = random.Random(5)
    prompts = [
        {"prompt_token_ids": random_prompt(draw, draw.randint(*PROMPT_TOKENS))}
        for _ in range(NUM_REQUESTS)
    ]
    outputs = []
    for first in range(0, NUM_REQUESTS, job["at_once"]):
        part = prompts[first : first + job["at_once"]]
        done = engine.llm.generate(part, engine.sampling(OUTPUT_TOKENS), use_tqdm=False)
        outputs += [list(output.outputs[0].token_ids) for output in done]
    result = {
        "outputs": outputs,
        "preemptions": counter(engine, "vllm:num_preemptions"),
        "hit_tokens": counter(engine, "vllm:kvpool_hit_tokens"),
    }
    Path(job["result"]).write_text(json.dumps(result))


def counter(engine: OfflineEngine, name: str) -> float:
    return sum(metric.value for metric in engine.llm.get_metrics() if metric.name == name)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
