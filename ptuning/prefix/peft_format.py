"""Read and write PEFT adapters of its three prompt-tuning methods, without importing PEFT.

Prefix Tuning: PEFT stores `prompt_embeddings` `[P, L * 2 * H * D]` (a row is a virtual token's keys
and values, layer by layer, keys before values) and passes them to the model as `past_key_values`.
So rotary embedding is already applied to its keys, as to ours, and both files have the same
numbers. H is the number of key-value heads (PEFT's `num_attention_heads`) and `token_dim` is H * D.
In PEFT a prefix is subject to sliding windows; ours is only with `sliding_window: respect`. An
adapter made by PEFT is read with that setting; a prefix of ours that ignores the window gives
different logits in PEFT once a text is longer than the window. For an encoder-decoder model PEFT
supports only the decoder's self-attention (`stacks: [decoder]`), with a layer order of its own.

Prompt Tuning and P-Tuning: `prompt_embeddings` `[P, E]` (for P-Tuning the encoder's output) come
before everything else at the input (of the encoder, for an encoder-decoder model). Other
placements, prefixes on some layers only or with several shapes, and ensembles cannot be stored in
PEFT's files. `Method.to_peft` says which format a prefix has.

A PEFT adapter does not record its user or its training, so `save_peft` adds one file, which PEFT
ignores. With it, saving and loading loses nothing: even the digest is the same.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeGuard, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from ptuning.errors import CorruptArtifact, WrongMethod, WrongShape
from ptuning.methods.base import (
    MAX_VIRTUAL_TOKENS,
    PEFT_PREFIX,
    PEFT_PROMPT,
    PEFT_PTUNING,
    Method,
    PeftForm,
    peft_refusal,
)
from ptuning.methods.catalogue import METHODS
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS
from ptuning.model.facts import DECODER, GroupFacts, keys_name, values_name
from ptuning.prefix.artifact import (
    ArtifactConfig,
    Prefix,
    PrefixMeta,
    check_owner,
    make_prefix,
)
from ptuning.system.files import write_atomic

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "ptuning_prefix.json"
TENSOR = "prompt_embeddings"
CAUSAL_TASK, PAIR_TASK = "CAUSAL_LM", "SEQ_2_SEQ_LM"
_PICKLE = "adapter_model.bin"
_KEYS, _VALUES = keys_name(DECODER, 0), values_name(DECODER, 0)  # PEFT supports one group only


def save_peft(prefix: Prefix, directory: str | os.PathLike[str], backbone: Backbone) -> Path:
    """Write a directory that `peft.PeftModel.from_pretrained` can read, and return it.

    Each file is written atomically, the configuration last. Raises an ArtifactError if the prefix
    is not of this backbone and WrongMethod if PEFT's files cannot express it; warns if PEFT's
    results differ beyond a sliding window.
    """
    prefix.check(backbone)
    form = prefix.method.to_peft(backbone.facts)
    has_keys = form.peft_type == PEFT_PREFIX
    if has_keys:
        _check_answers_move(backbone)
        _warn_of_window(prefix, backbone)
    task, (tensors,) = _task(backbone), prefix.members
    if has_keys:
        layers = torch.stack([tensors[_KEYS], tensors[_VALUES]], dim=1)
        tensor = flatten_layers(layers if task == CAUSAL_TASK else _for_pairs(layers))
    else:
        tensor = tensors[EMBEDDINGS]
    config = {
        "task_type": task,
        "base_model_name_or_path": prefix.meta.backbone,
        # Otherwise PEFT would build an encoder again and pass the values through it.
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        # 2 for an encoder-decoder model's keys and values, so that PEFT makes its cache. Virtual
        # tokens at the input go to the encoder only; nothing would read a second copy.
        "num_transformer_submodules": 2 if has_keys and task == PAIR_TASK else 1,
        **_sizes(form, tensor, backbone),
        **form.settings,
    }
    target = Path(directory)
    record = {"digest": prefix.digest, "meta": prefix.meta.to_texts()}
    write_atomic(target / WEIGHTS, save_safetensors({TENSOR: tensor}, {"format": "pt"}))
    write_atomic(target / OURS, _json(record))
    write_atomic(target / CONFIG, _json(config))
    return target


def load_peft(
    directory: str | os.PathLike[str],
    backbone: Backbone,
    *,
    user_key: str | None = None,
    prefix_name: str | None = None,
) -> Prefix:
    """Read a PEFT adapter of this backbone (Prefix Tuning, Prompt Tuning or P-Tuning).

    An adapter written by `save_peft` gives the original prefix. One made by PEFT records neither
    backbone nor template, so it is accepted if its shape fits; the prefix gets the given
    `user_key` (default: none, the empty key) and `prefix_name` (default: `default`). Raises
    CorruptArtifact, WrongBackbone, WrongMethod, WrongShape or WrongUser.
    """
    source = Path(directory)
    config = _read_json(source / CONFIG)
    _check_config(config, backbone)
    tensor = _read_tensor(source, config, backbone)
    if not (source / OURS).is_file():
        meta = _adopt(config["peft_type"], len(tensor), backbone, user_key, prefix_name)
        prefix = _prefix(config, tensor, backbone, meta)
        prefix.check(backbone)
        return prefix
    record = _read_json(source / OURS)
    try:
        prefix = _prefix(config, tensor, backbone, _read_meta(record["meta"]))
        expected = str(record["digest"])
        same = prefix.digest == expected
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{OURS} was not written by save_peft, or is damaged",
            seen=f"{source / OURS}: {error}",
            expected="digest and meta of a prefix",
            fix=f"remove {OURS} to read the directory as an adapter made by PEFT",
        ) from error
    if not same:
        raise CorruptArtifact(
            f"the adapter's weights do not match {OURS}",
            seen=prefix.digest,
            expected=expected,
            fix=f"remove {OURS} to read the directory as an adapter made by PEFT",
        )
    prefix.check(backbone)
    check_owner(prefix.meta, "adapter", user_key, prefix_name)
    return prefix


def flatten_layers(layers_L2HPD: Tensor) -> Tensor:
    """Flatten a stack's keys and values `[L, 2, H, P, D]` into PEFT's `[P, L * 2 * H * D]`."""
    layers = layers_L2HPD.detach().cpu()
    return layers.permute(3, 0, 1, 2, 4).reshape(layers.shape[3], -1).contiguous()


def unflatten_layers(flat: Tensor, backbone: Backbone, layers: int | None = None) -> Tensor:
    """The decoder's keys and values `[L, 2, H, P, D]` from PEFT's tensor, which has `layers` layers
    (default: L). Raises WrongShape, or WrongMethod if the decoder's layers have several shapes."""
    group = _only_group(backbone)
    decoder_layers = len(group.layers)
    layers = decoder_layers if layers is None else layers
    width = layers * 2 * group.heads * group.key_width
    if flat.ndim != 2 or flat.shape[1] != width or not len(flat) or layers < decoder_layers:
        raise _does_not_fit(
            flat,
            f"[P, {width}] = [P, {layers} layers x 2 x {group.heads} key-value heads x "
            f"{group.key_width}], of at least {decoder_layers} layers",
        )
    parts = flat.view(len(flat), layers, 2, group.heads, group.key_width)
    return parts.permute(1, 2, 3, 0, 4).contiguous()


def _only_group(backbone: Backbone) -> GroupFacts:
    """The only group of the decoder's layers. Raises WrongMethod if there are several shapes, which
    PEFT does not support."""
    first, *others = backbone.facts.stacks[DECODER].groups
    if others or first.key_width != first.value_width:
        shapes = [(group.heads, group.key_width, group.value_width) for group in (first, *others)]
        raise peft_refusal("keys and values of several shapes", shapes, "one shape")
    return first


def _read_by_pairs(layers: int, count: int) -> list[int]:
    """Which of the `count` layers in its tensor PEFT passes to each layer of an encoder-decoder
    model's decoder: it lists the layers twice, takes two for each and drops the second (PEFT 0.21).
    """
    return [2 * layer % count for layer in range(layers)]


def _for_pairs(kv_L2HPD: Tensor) -> Tensor:
    """Reorder layers so that PEFT reads them correctly. With an even count PEFT would read half of
    them twice and the others never, so one unused layer is added."""
    layers = len(kv_L2HPD)
    count = layers + 1 - layers % 2
    spread = torch.zeros((count, *kv_L2HPD.shape[1:]), dtype=kv_L2HPD.dtype)
    spread[_read_by_pairs(layers, count)] = kv_L2HPD.detach().cpu()
    return spread


def _task(backbone: Backbone) -> str:
    return CAUSAL_TASK if backbone.facts.decoder_start_id is None else PAIR_TASK


def _check_answers_move(backbone: Backbone) -> None:
    """Raise WrongMethod if the decoder ignores the prefix length: in PEFT an answer begins at
    position P."""
    if not backbone.moves_answers:
        raise peft_refusal(
            "keys and values for this model, whose decoder computes its own positions",
            type(backbone.model).__name__,
            "BART or T5",
            "method.type=prompt",
        )


def _warn_of_window(prefix: Prefix, backbone: Backbone) -> None:
    config = backbone.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    _, settings = get_layer_types_and_kwargs(config)
    windows = [layer["sliding_window"] for layer in settings if layer.get("sliding_window")]
    if windows and not prefix.method.visibility.windowed:
        warnings.warn(
            f"in PEFT this prefix leaves the sliding window: beyond {min(windows)} tokens PEFT's "
            "results differ; train with method.sliding_window=respect for equal results",
            stacklevel=3,
        )


def _sizes(form: PeftForm, tensor: Tensor, backbone: Backbone) -> dict[str, Any]:
    """The sizes that PEFT requires. It does not use layers and heads for embeddings, but requires
    them, and does not find them in nested configurations (T5Gemma)."""
    facts = backbone.facts.stacks[DECODER]
    heads = facts.groups[0].heads
    if form.peft_type != PEFT_PREFIX:
        width, layers = tensor.shape[1], facts.layers
        return _named_sizes(form, layers, heads, width)
    width = heads * facts.groups[0].key_width
    layers = tensor.shape[1] // (2 * width)
    return {**_named_sizes(form, layers, heads, width), "encoder_hidden_size": width}


def _named_sizes(form: PeftForm, layers: int, heads: int, width: int) -> dict[str, Any]:
    return {
        "peft_type": form.peft_type,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": width,
    }


def _prefix(config: dict[str, Any], tensor: Tensor, backbone: Backbone, meta: PrefixMeta) -> Prefix:
    """Make a prefix from PEFT's tensor, in the tensor's dtype."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in get_args(ArtifactConfig.model_fields["dtype"].annotation):
        dtype = "float32"
    stored = ArtifactConfig.model_validate({"dtype": dtype})
    if config["peft_type"] == PEFT_PREFIX:
        if _task(backbone) == CAUSAL_TASK:
            layers = unflatten_layers(tensor, backbone)
        else:
            layers = unflatten_layers(tensor, backbone, config.get("num_layers"))
            decoder_layers = backbone.facts.stacks[DECODER].layers
            layers = layers[_read_by_pairs(decoder_layers, len(layers))]
        return make_prefix([{_KEYS: layers[:, 0], _VALUES: layers[:, 1]}], meta, stored)
    width = backbone.facts.hidden_size
    if tensor.ndim != 2 or tensor.shape[1] != width or not len(tensor):
        raise _does_not_fit(tensor, f"[P, {width}]")
    return make_prefix([{EMBEDDINGS: tensor}], meta, stored)


def _adopt(
    peft_type: str, length: int, backbone: Backbone, user_key: str | None, prefix_name: str | None
) -> PrefixMeta:
    """Metadata for an adapter made by PEFT, which records no origin."""
    method: Method | None = None
    for candidate in METHODS.values():
        method = method or candidate.from_peft(peft_type, length, backbone.facts)
    assert method is not None, peft_type  # _check_config has refused other types
    return PrefixMeta.of(
        backbone,
        method,
        user_key=user_key or "",
        prefix_name=prefix_name or "default",
        imported_from="peft",
    )


def _read_meta(texts: Any) -> PrefixMeta:
    """Parse the metadata written by `save_peft`. Raises TypeError or an ArtifactError."""
    meta = PrefixMeta.from_texts(texts)
    if meta.to_texts() != texts:
        raise TypeError(f"meta has {sorted(texts)}")
    return meta


def _does_not_fit(tensor: Tensor, expected: str) -> WrongShape:
    return WrongShape(
        "the PEFT adapter does not fit the backbone",
        seen=f"{TENSOR} {tuple(tensor.shape)}",
        expected=expected,
        fix="load the backbone that the adapter was trained on",
    )


def _check_config(config: dict[str, Any], backbone: Backbone) -> None:
    peft_type, task = config.get("peft_type"), _task(backbone)
    if peft_type not in (PEFT_PREFIX, PEFT_PROMPT, PEFT_PTUNING):
        raise WrongMethod(
            "the PEFT adapter is of another method",
            seen=peft_type,
            expected=f"{PEFT_PREFIX}, {PEFT_PROMPT} or {PEFT_PTUNING}",
            fix="train the adapter with one of these",
        )
    if config.get("task_type") not in (None, task):
        raise WrongMethod(
            "the PEFT adapter is of another kind of model",
            seen=f"task_type {config['task_type']}",
            expected=task,
            fix="load the backbone that the adapter was trained on",
        )
    if peft_type == PEFT_PREFIX and not backbone.moves_answers:
        raise WrongMethod(
            "PEFT's Prefix Tuning shifts an answer's positions, but this model computes its own",
            seen=f"{peft_type} of {type(backbone.model).__name__}",
            expected=f"{PEFT_PROMPT} or {PEFT_PTUNING}, or another model",
            fix="train the adapter with one of these, or train the prefix here",
        )
    # For an encoder-decoder model PEFT stores one or two copies of embeddings, but always two of
    # keys and values.
    counts = (1,) if task == CAUSAL_TASK else (2,) if peft_type == PEFT_PREFIX else (1, 2)
    if _copies(config, backbone) not in counts:
        raise WrongMethod(
            "the PEFT adapter is of an encoder-decoder model"
            if task == CAUSAL_TASK
            else "PEFT does not make such adapters for this kind of model",
            seen=f"num_transformer_submodules {config['num_transformer_submodules']}",
            expected=" or ".join(map(str, counts)),
            fix="load the backbone that the adapter was trained on",
        )
    length = config.get("num_virtual_tokens")
    if _is_count(length) and length > MAX_VIRTUAL_TOKENS:
        raise WrongMethod(
            "the PEFT adapter has too many virtual tokens",
            seen=f"num_virtual_tokens {length}",
            expected=f"at most {MAX_VIRTUAL_TOKENS}",
            fix="train it again with fewer",
        )
    if peft_type == PEFT_PREFIX:
        _check_geometry(config, backbone)


def _check_geometry(config: dict[str, Any], backbone: Backbone) -> None:
    """Raise WrongShape if the adapter's layers and heads are not the backbone's: another model's
    values can have the same number of columns. For an encoder-decoder model PEFT stores as many
    layers as the encoder has."""
    group, pairs = _only_group(backbone), _task(backbone) == PAIR_TASK
    wanted = {
        "num_layers": len(group.layers),
        "num_attention_heads": group.heads,
        "token_dim": group.heads * group.key_width,
    }
    for name, count in wanted.items():
        stated = config.get(name)
        more = pairs and name == "num_layers" and _is_count(stated) and stated > count
        if stated is not None and not more and not (_is_count(stated) and stated == count):
            raise WrongShape(
                "the PEFT adapter does not fit the backbone",
                seen=f"{name} {stated!r}",
                expected=f"at least {count}" if pairs and name == "num_layers" else count,
                fix="load the backbone that the adapter was trained on",
            )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _copies(config: dict[str, Any], backbone: Backbone) -> int | None:
    """For how many stacks the adapter has virtual tokens; by default for all of the model's. None:
    the setting is not a number."""
    stated = config.get("num_transformer_submodules")
    if stated is None:
        return 1 if _task(backbone) == CAUSAL_TASK else 2
    return stated if _is_count(stated) else None


def _rows(config: dict[str, Any], backbone: Backbone) -> int | None:
    """How many rows the tensor should have; None: unknown. For virtual tokens at the input PEFT
    stores P for each stack and reads the first P."""
    length, copies = config.get("num_virtual_tokens"), _copies(config, backbone)
    if not _is_count(length) or copies is None:
        return None
    return length * (1 if config["peft_type"] == PEFT_PREFIX else copies)


def _read_tensor(source: Path, config: dict[str, Any], backbone: Backbone) -> Tensor:
    if not (source / WEIGHTS).is_file() and (source / _PICKLE).is_file():
        raise CorruptArtifact(
            "the PEFT adapter is a pickle, which can run code when it is loaded",
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
            expected=f"{TENSOR} in safetensors",
            fix="save the adapter again",
        ) from error
    if set(tensors) != {TENSOR} or not torch.is_floating_point(tensors[TENSOR]):
        raise WrongShape(
            "the PEFT adapter must contain just one tensor, of keys and values or of embeddings",
            seen={name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()},
            expected=f"{TENSOR} [P, L * 2 * H * D] or [P, E]",
            fix="use an adapter of just Prefix Tuning, Prompt Tuning or P-Tuning",
        )
    tensor, length = tensors[TENSOR], config.get("num_virtual_tokens")
    rows = tensor.shape[0] if tensor.ndim else 0
    if not _is_count(length) or length < 1 or rows != _rows(config, backbone):
        raise WrongShape(
            "the PEFT adapter's weights do not have the length that its configuration states",
            seen=f"{TENSOR} {tuple(tensor.shape)}",
            expected=f"num_virtual_tokens {length}",
            fix="save the adapter again, weights and configuration together",
        )
    return tensor[:length]


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
        raise _no_object(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise _no_object(f"{path}: {type(value).__name__}")
    return value


def _no_object(seen: str) -> CorruptArtifact:
    return CorruptArtifact(
        "the PEFT adapter's file is not a JSON object",
        seen=seen,
        expected="a file written by PEFT or save_peft",
        fix="save the adapter again",
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8")
