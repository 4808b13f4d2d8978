"""A backbone's identity: what its files compute, not how they are written.

A prefix is refused on any other backbone. So the fingerprint must change with everything that can
change an answer and with nothing else: a newer Transformers that saves one more empty key must
not orphan every user's prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptuning.model.locate import CONVERTED, Source, sha256_of, weight_files

# Settings that the forward pass of a frozen model in evaluation mode never reads. `eos_token_id`
# says where an answer may stop, not what is in it; vendors correct it after the fact.
_COSMETIC = frozenset(
    {
        "architectures",
        "auto_map",
        "bad_words_ids",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "init_std",
        "label2id",
        "layerdrop",
        "max_length",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unk_token_id",
        "use_cache",
        "vocab_file",
    }
)


def fingerprint_of(source: Source, config: Any) -> str:
    """SHA-256 identity of a backbone, the same for every dtype it is loaded in.

    It covers the weight files that are loaded (the GGUF file itself if they were converted from
    one) and the settings in `config`, a Transformers configuration, that affect the computation.
    """
    path = Path(source.path)
    if (path / CONVERTED).is_file():
        return str(json.loads((path / CONVERTED).read_text())["fingerprint"])
    digest = hashlib.sha256(settings_text(config).encode())
    for file in weight_files(path):
        digest.update(f"{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def fingerprint_of_weights(model: torch.nn.Module, config: Any) -> str:
    """The identity of a model already in memory, from its values in their current dtype."""
    digest = hashlib.sha256(settings_text(config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        octets = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(octets.numpy().tobytes())
    return digest.hexdigest()


def settings_text(config: Any) -> str:
    """The settings of a configuration that affect the computation, as sorted JSON: those that
    differ from the class's defaults, without cosmetic ones. A setting added by a later release
    has its default, so it changes nothing."""
    try:
        defaults = type(config)().to_dict()
    except (TypeError, ValueError):  # the class needs arguments
        defaults = {}
    settings = _relevant(config.to_dict(), defaults)
    return json.dumps(settings | {"model_type": config.model_type}, sort_keys=True, default=str)


def _relevant(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in settings.items():
        cosmetic = key in _COSMETIC or key.startswith("_") or "dropout" in key
        if cosmetic or "layerdrop" in key or value is None or value == defaults.get(key):
            continue
        if isinstance(value, Mapping):
            # Only a nested configuration has defaults.
            nested = defaults.get(key) if "model_type" in value else None
            kept[key] = _relevant(value, nested or {})
        else:
            kept[key] = value
    return kept
