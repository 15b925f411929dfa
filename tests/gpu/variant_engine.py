"""One engine, in a process of its own, that `engine_variants` starts with a file of JSON.

python tests/gpu/variant_engine.py JOB
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

# A script's own folder comes first: add `benchmarks`.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.offline import OfflineEngine, random_prompt

PROMPT_TOKENS = (500, 3_000, 5_000)
OUTPUT_TOKENS = 16
CROWD = 24
CROWD_PROMPT_TOKENS = (200, 900)
CROWD_OUTPUT_TOKENS = 120
STORE_S = 0.3


def hits(engine: OfflineEngine, *, computes: bool) -> dict[str, Any]:
    """Greedy tokens of each prompt, in each way in which its blocks may come; and how many tokens did come. An engine
    that does not compute finds them in the pool at once."""
    draw = random.Random(3)
    prompts = [random_prompt(draw, length) for length in PROMPT_TOKENS]
    kinds = ["computed", "vram", "pool"] if computes else ["pool", "vram"]
    result: dict[str, Any] = {}
    for kind in kinds:
        rows = []
        for prompt in prompts:
            if kind == "pool" and computes:
                time.sleep(STORE_S)
                engine.forget_vram()
            _, tokens, cached = engine.generate(prompt, OUTPUT_TOKENS)
            rows.append((tokens, cached))
        result[kind] = {"tokens": [row[0] for row in rows], "cached": [row[1] for row in rows]}
    return result


def crowd(engine: OfflineEngine, at_once: int) -> dict[str, Any]:
    """The same requests every time, `at_once` of them together."""
    draw = random.Random(5)
    prompts = [
        {"prompt_token_ids": random_prompt(draw, draw.randint(*CROWD_PROMPT_TOKENS))}
        for _ in range(CROWD)
    ]
    tokens = []
    for first in range(0, CROWD, at_once):
        part = prompts[first : first + at_once]
        done = engine.llm.generate(part, engine.sampling(CROWD_OUTPUT_TOKENS), use_tqdm=False)
        tokens += [list(output.outputs[0].token_ids) for output in done]
    return {"tokens": tokens}


def main(job: dict[str, Any]) -> None:
    engine = OfflineEngine(job["model"], job["transfer"], **job["engine"])
    crowded = "at_once" in job
    result = crowd(engine, job["at_once"]) if crowded else hits(engine, computes=job["computes"])
    result |= {"counters": engine.counters(), "start_s": engine.start_s}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
