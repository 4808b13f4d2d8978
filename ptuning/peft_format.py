"""To and from PEFT's Prefix Tuning checkpoints, without importing PEFT.

PEFT keeps `prompt_embeddings` `[P, L * 2 * H * D]` (a row is a virtual token's keys and values,
layer by layer, keys before values) and hands them to the model as `past_key_values`, so its
keys are as after rotary embedding, as ours are: the two files hold the same numbers. H are
key-value heads (PEFT calls them `num_attention_heads`) and `token_dim` is H * D. With a
sliding window the two differ on longer texts: PEFT's prefix leaves the window, ours stays.

A PEFT adapter does not say whose it is or what it was trained on, so ours has one file more,
which PEFT ignores; with it the way there and back loses nothing, the digest included.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ptuning.artifact import Prefix, PrefixMeta, write_file
from ptuning.backbone import DECODER, Backbone
from ptuning.errors import CorruptArtifact, WrongMethod, WrongShape, WrongUser

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "ptuning_prefix.json"
TENSOR = "prompt_embeddings"
_PICKLE = "adapter_model.bin"


def save_peft(prefix: Prefix, directory: str | os.PathLike[str], backbone: Backbone) -> Path:
    """Write a directory that `peft.PeftModel.from_pretrained` reads; returns it.

    Each file appears whole, the configuration last. Raises an ArtifactError where the prefix
    is not of this backbone, WrongMethod where the backbone is no causal model.
    """
    prefix.check(backbone)
    if set(prefix.kv) != {DECODER}:
        raise WrongMethod(
            "PEFT's Prefix Tuning has one stack only", seen=sorted(prefix.kv), expected=DECODER
        )
    kv = prefix.kv[DECODER]
    layers, _, heads, length, dim = kv.shape
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": prefix.meta.backbone,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }
    target = Path(directory)
    write_file(target / WEIGHTS, save_safetensors({TENSOR: flattened(kv)}, {"format": "pt"}))
    write_file(target / OURS, _json({"digest": prefix.digest, "meta": asdict(prefix.meta)}))
    write_file(target / CONFIG, _json(config))
    return target


def load_peft(
    directory: str | os.PathLike[str],
    backbone: Backbone,
    *,
    user_key: str | None = None,
    prefix_name: str | None = None,
) -> Prefix:
    """Read a PEFT Prefix Tuning adapter of this backbone as a prefix.

    One that `save_peft` wrote comes back as it was. One made by PEFT is taken to be of this
    backbone and template if its shape fits (nothing in it says so), belongs to `user_key`
    (default: nobody, the empty key) and is called `prefix_name` (default: `default`). Raises
    CorruptArtifact, WrongBackbone, WrongMethod, WrongShape or WrongUser.
    """
    source = Path(directory)
    config = _read_json(source / CONFIG)
    _check_config(config)
    kv = unflattened(_read_tensor(source), backbone)
    if not (source / OURS).is_file():
        return _adopted(kv, backbone, user_key or "", prefix_name or "default")
    record = _read_json(source / OURS)
    try:
        prefix = Prefix({DECODER: kv}, PrefixMeta(**record["meta"]))
        expected = str(record["digest"])
        same = prefix.digest == expected
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{OURS} is not what save_peft writes",
            seen=f"{source / OURS}: {error}",
            fix=f"remove {OURS} to read the directory as an adapter made by PEFT",
        ) from error
    if not same:
        raise CorruptArtifact(
            f"the adapter's weights are not those that {OURS} was written for",
            seen=prefix.digest,
            expected=expected,
            fix=f"remove {OURS} to read the directory as an adapter made by PEFT",
        )
    prefix.check(backbone)
    _check_owner(prefix.meta, user_key, prefix_name)
    return prefix


def flattened(kv_L2HPD: Tensor) -> Tensor:
    """PEFT's `[P, L * 2 * H * D]` of one stack's `[L, 2, H, P, D]`."""
    kv = kv_L2HPD.detach().cpu()
    return kv.permute(3, 0, 1, 2, 4).reshape(kv.shape[3], -1).contiguous()


def unflattened(flat: Tensor, backbone: Backbone) -> Tensor:
    """The backbone's `[L, 2, H, P, D]` of PEFT's tensor. Raises WrongShape."""
    facts = backbone.facts.stacks[DECODER]
    width = facts.layers * 2 * facts.heads * facts.head_dim
    if flat.ndim != 2 or flat.shape[1] != width or not len(flat):
        raise WrongShape(
            "the PEFT adapter does not fit the backbone",
            seen=f"{TENSOR} {tuple(flat.shape)}",
            expected=f"[P, {width}] = [P, {facts.layers} layers x 2 x {facts.heads} key-value "
            f"heads x {facts.head_dim}]",
            fix="load the backbone that the adapter was trained on",
        )
    parts = flat.view(len(flat), facts.layers, 2, facts.heads, facts.head_dim)
    return parts.permute(1, 2, 3, 0, 4).contiguous()


def _adopted(kv: Tensor, backbone: Backbone, user_key: str, prefix_name: str) -> Prefix:
    """A prefix of an adapter that says nothing of its origin."""
    prefix = Prefix(
        {DECODER: kv},
        PrefixMeta(
            method={
                "type": "prefix",
                "num_virtual_tokens": int(kv.shape[3]),
                "imported_from": "peft",
            },
            backbone=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
            template_digest=backbone.template.digest,
            user_key=user_key,
            prefix_name=prefix_name,
        ),
    )
    prefix.check(backbone)
    return prefix


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "PREFIX_TUNING":
        raise WrongMethod(
            "the PEFT adapter is of another method",
            seen=config.get("peft_type"),
            expected="PREFIX_TUNING",
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise WrongMethod(
            "the PEFT adapter is of an encoder-decoder model",
            seen=f"num_transformer_submodules {config['num_transformer_submodules']}",
            expected=1,
        )


def _check_owner(meta: PrefixMeta, user_key: str | None, prefix_name: str | None) -> None:
    if user_key is not None and meta.user_key != user_key:
        raise WrongUser(
            "the adapter belongs to another user", seen=meta.user_key, expected=user_key
        )
    if prefix_name is not None and meta.prefix_name != prefix_name:
        raise WrongUser("the adapter has another name", seen=meta.prefix_name, expected=prefix_name)


def _read_tensor(source: Path) -> Tensor:
    if not (source / WEIGHTS).is_file() and (source / _PICKLE).is_file():
        raise CorruptArtifact(
            "the PEFT adapter is a pickle, which can run code when it is read",
            seen=str(source / _PICKLE),
            expected=WEIGHTS,
            fix="save it again with safe_serialization=True",
        )
    data = _read(source / WEIGHTS)
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptArtifact(
            "the PEFT adapter's weights are not safetensors, or cut short",
            seen=f"{source / WEIGHTS}: {len(data)} bytes: {error}",
        ) from error
    if set(tensors) != {TENSOR} or not torch.is_floating_point(tensors[TENSOR]):
        raise WrongShape(
            "the PEFT adapter does not hold one tensor of keys and values",
            seen={name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()},
            expected=f"{TENSOR} [P, L * 2 * H * D]",
        )
    return tensors[TENSOR]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptArtifact(
            "the PEFT adapter cannot be read",
            seen=str(error),
            expected=f"a directory with {CONFIG} and {WEIGHTS}",
            fix="check the path",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise CorruptArtifact("not a JSON file", seen=f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CorruptArtifact("not a JSON object", seen=str(path))
    return value


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8")
