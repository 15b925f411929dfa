"""One vLLM engine without a server, for timings on a GPU: dummy weights, prompts of random token ids."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL_SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
    },
    "tiny-mla": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 128256,
    },
}
"""As Llama 3 8B and Llama 3.2 1B; `tiny` is for tests, and for trying the scripts out on a CPU; `tiny-mla` has the
attention of DeepSeek V2, and no experts."""
TOKEN_IDS = range(1_000, 100_000)
RESET_TRIES = 200
SETTLE_S = 3.0
"""After the start: what a connector does in the background is to be over."""


def make_model(folder: Path, size: str) -> Path:
    """A configuration only: vLLM makes up the weights (`load_format="dummy"`)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
        "tie_word_embeddings": False,
        **MODEL_SHAPES[size],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def kv_bytes_per_token(size: str, kv_cache_dtype: str = "auto") -> int:
    shape = MODEL_SHAPES[size]
    if "kv_lora_rank" in shape:
        return 2 * shape["num_hidden_layers"] * (shape["kv_lora_rank"] + shape["qk_rope_head_dim"])
    head = shape.get("head_dim", shape["hidden_size"] // shape["num_attention_heads"])
    item = 1 if kv_cache_dtype.startswith("fp8") else 2
    return 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * item


class OfflineEngine:
    """`start_s`: what making it took. `salt`: of the prompts' hashes, so that engines which share a pool but not their
    salt find nothing of each other."""

    def __init__(
        self,
        model: str,
        transfer: dict[str, Any] | None,
        *,
        salt: str = "",
        settle_s: float = SETTLE_S,
        **options: Any,
    ) -> None:
        from vllm import LLM

        connector = {} if transfer is None else {"kv_transfer_config": transfer}
        options.setdefault("max_model_len", 40_000)
        begun = time.perf_counter()
        self.llm = LLM(
            model,
            load_format="dummy",
            skip_tokenizer_init=True,
            disable_log_stats=False,
            enable_prefix_caching=True,
            **connector,
            **options,
        )
        self.start_s = time.perf_counter() - begun
        self._salt = {"cache_salt": salt} if salt else {}
        self._draw = random.Random(0)
        self._sums: Counter[str] = Counter()
        self._listen(self.llm.llm_engine.output_processor)
        time.sleep(settle_s)

    def generate(self, prompt: list[int], num_tokens: int) -> tuple[float, list[int], int]:
        """Seconds, greedy tokens, and how many of the prompt's tokens came from a cache."""
        begun = time.perf_counter()
        (output,) = self.llm.generate(
            [self.salted(prompt)], self.sampling(num_tokens), use_tqdm=False
        )
        seconds = time.perf_counter() - begun
        return seconds, list(output.outputs[0].token_ids), output.num_cached_tokens or 0

    def salted(self, prompt: list[int]) -> dict[str, Any]:
        """As vLLM takes prompts."""
        return {"prompt_token_ids": prompt, **self._salt}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Requests that are added meanwhile wait for its end: no step begins with the first few of them, so the steps
        of a batch are the same each time. It begins when the engine has nothing left to do."""
        self.llm.sleep(level=0, mode="keep")
        yield
        self.llm.wake_up(tags=["scheduling"])

    @staticmethod
    def sampling(num_tokens: int, **options: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options
        )

    def wake(self) -> None:
        """By a request of less than a block: the first one after a rest takes longer."""
        self.generate(random_prompt(self._draw, 8), 1)

    def forget_vram(self) -> None:
        """Empties the engine's own prefix cache. It refuses while stores hold blocks: steps with a
        small request let these end."""
        for _ in range(RESET_TRIES):
            if self.llm.reset_prefix_cache():
                return
            self.generate(random_prompt(self._draw, 40), 1)
            time.sleep(0.02)
        raise RuntimeError("the prefix cache cannot be reset: something holds its blocks")

    def _listen(self, processor: Any) -> None:
        """vLLM's `LLM` (not its server) drops what steps without an output report, and a load is such a step: so hear
        of it before it does."""
        hand_on = processor.update_scheduler_stats

        def count(stats: Any) -> None:
            for name, value in ((stats and stats.kv_connector_stats) or {}).items():
                if isinstance(value, list):
                    self._sums[f"{name}:count"] += len(value)
                    self._sums[f"{name}:sum"] += sum(value)
                elif isinstance(value, int | float):  # others' may be anything
                    self._sums[name] += value
            hand_on(stats)

        processor.update_scheduler_stats = count

    def counters(self) -> Counter[str]:
        """Sums so far: preemptions, and all that our connector counts, "name:reason" where it has one.
        "name:count" and "name:sum" of what it times."""
        preempted = (m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")
        return Counter({**self._sums, "num_preemptions": sum(preempted)})


def random_prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.choice(TOKEN_IDS) for _ in range(length)]
