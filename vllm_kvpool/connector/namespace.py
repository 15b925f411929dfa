"""Who may share blocks: the fields that two engines must have in common, value by value.

vLLM's block hash covers the tokens; everything else that decides the bytes of a block is here.
False differences cost hits, a missing field costs correct answers, so a field too many it is.
`doctor` and the log show the fields, which is why long values are digests with a readable head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kvpool._native import FORMAT_VERSION
from vllm_kvpool.config import ConnectorConfig
from vllm_kvpool.connector import compat
from vllm_kvpool.keys import namespace_digest
from vllm_kvpool.protocol import Namespace

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.tensors", "*.index.json")
DRAFTERS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")
SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
LONG_CONTEXT_ROPES = ("longrope", "dynamic")
"""With these the longest context decides the rotary embedding even of short prompts."""
UNSTABLE_CONFIG_KEYS = ("_name_or_path", "transformers_version")


def static_fields(vllm_config: Any, config: ConnectorConfig, block_tokens: int) -> dict[str, str]:
    """All that is known when the engine starts. Reads samples of the model's files: seconds for
    large ones."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    return {
        **model_fields(vllm_config.model_config, vllm_config.load_config),
        "cache_dtype": str(cache.cache_dtype),
        "block_tokens": str(block_tokens),
        "parallel": " ".join(
            f"{short}={getattr(parallel, name, 1)}"
            for short, name in (
                ("tp", "tensor_parallel_size"),
                ("pp", "pipeline_parallel_size"),
                ("pcp", "prefill_context_parallel_size"),
                ("dcp", "decode_context_parallel_size"),
            )
        ),
        "drafter": _drafter(vllm_config.speculative_config),
        "vllm": compat.vllm_minor(),
        "hash": str(cache.prefix_caching_hash_algo),
        "format": str(FORMAT_VERSION),
        "epoch": config.epoch,
    }


def build_namespace(
    known: Mapping[str, str], none_hash: bytes, layouts: Sequence[str], slot_bytes: int
) -> Namespace:
    """`known`: `static_fields`; `layouts`: of a slot's shards, in their order."""
    fields = {**known, "none_hash": _short(none_hash), "layout": _joined(layouts)}
    return Namespace(digest=namespace_digest(fields), slot_bytes=slot_bytes, fields=fields)


def model_fields(model: Any, load: Any) -> dict[str, str]:
    config = {
        key: value
        for key, value in model.hf_config.to_dict().items()
        if key not in UNSTABLE_CONFIG_KEYS
    }
    text = json.dumps(config, sort_keys=True, default=str)
    fields = {
        "config": _short(text.encode()),
        "dtype": f"{model.dtype} quantization={model.quantization}",
        "weights": weights_identity(model, load),
    }
    if any(rope in text for rope in LONG_CONTEXT_ROPES):
        fields["max_model_len"] = str(model.max_model_len)
    return fields


def weights_identity(model: Any, load: Any) -> str:
    """Files by name, size and samples of their bytes; else name and revision.

    Not by time: two copies of one model may share. Sizes and index files are equal in all
    fine-tunes of a model, hence the samples; hashing every byte would add minutes to each start.
    """
    load_format = str(getattr(load, "load_format", "auto"))
    name = f"{model.model} revision={model.revision} format={load_format}"
    if load_format == "dummy":
        return f"{name} seed={model.seed}"
    files = _weight_files(str(model.model), model.revision)
    if not files:
        return name
    digest = hashlib.sha256(load_format.encode())
    for file in files:
        digest.update(_file_identity(file))
    return f"{len(files)} files sha256:{digest.hexdigest()[:32]}"


def _model_folder(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return None
    try:
        config = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # a URL, an object store ...
        return None
    return Path(config).parent if isinstance(config, str) else None


def _weight_files(model: str, revision: str | None) -> list[Path]:
    if Path(model).is_file():
        return [Path(model)]
    folder = _model_folder(model, revision)
    if folder is None:
        return []
    found = (file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    return sorted(file for file in found if file.is_file())


def _file_identity(file: Path) -> bytes:
    status = file.stat()
    digest = hashlib.sha256(f"{file.name} {status.st_size}".encode())
    step = max(1, status.st_size // SAMPLES_PER_FILE)
    with file.open("rb") as stream:
        for start in range(0, status.st_size, step):
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.digest()


def _drafter(speculative: Any) -> str:
    """A drafter's KV lies in the same blocks, if it has any."""
    if speculative is None or speculative.method in DRAFTERS_WITHOUT_KV:
        return "none"
    names = ("method", "model", "revision", "num_speculative_tokens")
    return " ".join(str(getattr(speculative, name, None)) for name in names)


def _joined(layouts: Sequence[str]) -> str:
    if len(set(layouts)) == 1:
        return f"{len(layouts)} x {layouts[0]}"
    return f"{len(layouts)} shards sha256:{_short(json.dumps(list(layouts)).encode())}"


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
