"""A tiny random model that vLLM serves like a real one: no download, no model hub.

    python -m benchmarks.tiny_model DIR

Weights come from a fixed seed, so two engines on two machines hold the same model and greedy output
is the same. The tokenizer is byte-level: one token a byte, so a prompt's length is its token count.
"""

import argparse
import json
from pathlib import Path
from typing import Any

BYTES = 256
SPECIALS = ("<s>", "</s>", "<pad>")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
RECIPE_FILE = "recipe.json"


def make_tiny_model(
    path: str | Path,
    *,
    hidden_size: int = 512,
    num_layers: int = 8,
    num_heads: int = 8,
    num_kv_heads: int = 4,
    intermediate_size: int = 1536,
    max_tokens: int = 40960,
    sliding_window: int | None = None,
    initializer_range: float = 0.05,
    seed: int = 0,
) -> Path:
    """Write the model into the folder `path`, unless the same one is there; return the folder.

    The default has 25M parameters in bfloat16 and 8 KiB of KV a token (float32 engines: 16 KiB).
    `initializer_range` 0.05 makes attention sharp enough that the whole prompt shapes the output;
    with the usual 0.02 it soon repeats one token, whatever the prompt.

    With `sliding_window` (tokens) it is a Gemma 3 instead, every fourth layer of it with full
    attention: vLLM keeps its KV cache in several groups.
    """
    recipe = {key: value for key, value in locals().items() if key != "path"}
    path = Path(path)
    if not _made_already(path, recipe):
        path.mkdir(parents=True, exist_ok=True)
        (path / RECIPE_FILE).unlink(missing_ok=True)
        _save_tokenizer(path, max_tokens)
        _save_weights(path, recipe)
        (path / RECIPE_FILE).write_text(json.dumps(recipe))  # last: an unfinished model has none
    return path


def _made_already(path: Path, recipe: dict[str, Any]) -> bool:
    file = path / RECIPE_FILE
    return file.exists() and json.loads(file.read_text()) == recipe


def _save_tokenizer(path: Path, max_tokens: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, *SPECIALS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_tokens,
    ).save_pretrained(path)


def _save_weights(path: Path, recipe: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig
    from transformers.utils import logging

    common = {
        "vocab_size": BYTES + len(SPECIALS),
        "hidden_size": recipe["hidden_size"],
        "intermediate_size": recipe["intermediate_size"],
        "num_hidden_layers": recipe["num_layers"],
        "num_attention_heads": recipe["num_heads"],
        "num_key_value_heads": recipe["num_kv_heads"],
        "head_dim": recipe["hidden_size"] // recipe["num_heads"],
        "max_position_embeddings": recipe["max_tokens"],
        "initializer_range": recipe["initializer_range"],
        "bos_token_id": BYTES,
        "eos_token_id": BYTES + 1,
        "pad_token_id": BYTES + 2,
        "tie_word_embeddings": False,
    }
    if window := recipe["sliding_window"]:
        kinds = [
            "full_attention" if n % 4 == 3 else "sliding_attention"
            for n in range(recipe["num_layers"])
        ]
        config = Gemma3TextConfig(**common, sliding_window=window, layer_types=kinds)
    else:
        config = LlamaConfig(**common)
    logging.disable_progress_bar()
    torch.manual_seed(recipe["seed"])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the tiny model into a folder.")
    parser.add_argument("folder", type=Path)
    print(make_tiny_model(parser.parse_args().folder))


if __name__ == "__main__":
    main()
