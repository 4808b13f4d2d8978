"""To and from PEFT's checkpoints of its three kinds, without importing PEFT.

Prefix Tuning: PEFT keeps `prompt_embeddings` `[P, L * 2 * H * D]` (a row is a virtual token's
keys and values, layer by layer, keys before values) and hands them to the model as
`past_key_values`, so its keys are as after rotary embedding, as ours are: the two files hold
the same numbers. H are key-value heads (PEFT calls them `num_attention_heads`) and `token_dim`
is H * D. With a sliding window PEFT's prefix leaves the window, which ours does only with
`visibility: window`: one that PEFT made is read as such, one of ours that stays visible gives
other logits there once a text is longer than the window. Of an encoder-decoder model PEFT gives
a prefix to the decoder's self-attention alone (`stacks: [decoder]`), in an order of its own.

Prompt Tuning and P-Tuning: `prompt_embeddings` `[P, E]`, of P-Tuning the encoder's output, put
before everything else at the input (the encoder's, of an encoder-decoder model). What stands
elsewhere, in some layers only, or answers as an ensemble has no place in PEFT's files.

A PEFT adapter does not say whose it is or what it was trained on, so ours has one file more,
which PEFT ignores; with it the way there and back loses nothing, the digest included.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from ptuning.data.layout import front
from ptuning.errors import CorruptArtifact, WrongMethod, WrongShape, WrongUser
from ptuning.methods.base import MAX_VIRTUAL_TOKENS
from ptuning.model.backbone import Backbone
from ptuning.model.facts import DECODER
from ptuning.prefix.artifact import Prefix, PrefixMeta
from ptuning.system.files import write_atomic

CONFIG, WEIGHTS, OURS = "adapter_config.json", "adapter_model.safetensors", "ptuning_prefix.json"
TENSOR = "prompt_embeddings"
PREFIX, PROMPT, PTUNING = "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"
CAUSAL_TASK, PAIR_TASK = "CAUSAL_LM", "SEQ_2_SEQ_LM"
_PICKLE = "adapter_model.bin"


def save_peft(prefix: Prefix, directory: str | os.PathLike[str], backbone: Backbone) -> Path:
    """Write a directory that `peft.PeftModel.from_pretrained` reads; returns it.

    Each file appears whole, the configuration last. Raises an ArtifactError where the prefix
    is not of this backbone, WrongMethod where PEFT's files cannot express it; warns where PEFT
    will compute something else beyond a sliding window.
    """
    prefix.check(backbone)
    _check_expressible(prefix, backbone)
    _warn_of_window(prefix, backbone)
    task = _task(backbone)
    if prefix.kv:
        kv = prefix.kv[DECODER] if task == CAUSAL_TASK else _for_pairs(prefix.kv[DECODER])
        tensor, own = flattened(kv), _kv_config(kv)
    else:
        tensor = prefix.embeddings[0].detach().cpu().contiguous()
        own = _embedding_config(prefix, backbone)
    config = {
        "task_type": task,
        "base_model_name_or_path": prefix.meta.backbone,
        # Without it PEFT builds the encoder that was dropped, and sends the values through it.
        "inference_mode": True,
        "num_virtual_tokens": prefix.num_virtual_tokens,
        # 2 where PEFT must make an encoder-decoder model's cache; virtual tokens at the input are
        # the encoder's alone, and a second half of them would be read by nothing.
        "num_transformer_submodules": 2 if prefix.kv and task == PAIR_TASK else 1,
        **own,
    }
    target = Path(directory)
    write_atomic(target / WEIGHTS, save_safetensors({TENSOR: tensor}, {"format": "pt"}))
    write_atomic(target / OURS, _json({"digest": prefix.digest, "meta": asdict(prefix.meta)}))
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

    One that `save_peft` wrote comes back as it was. One made by PEFT is taken to be of this
    backbone and template if its shape fits (nothing in it says so), belongs to `user_key`
    (default: nobody, the empty key) and is called `prefix_name` (default: `default`). Raises
    CorruptArtifact, WrongBackbone, WrongMethod, WrongShape or WrongUser.
    """
    source = Path(directory)
    config = _read_json(source / CONFIG)
    _check_config(config, backbone)
    tensor = _read_tensor(source, config, backbone)
    if not (source / OURS).is_file():
        meta = _adopted(config["peft_type"], len(tensor), backbone)
        owner = {"user_key": user_key or "", "prefix_name": prefix_name or "default"}
        prefix = _prefix(config, tensor, backbone, PrefixMeta(**meta | owner))
        prefix.check(backbone)
        return prefix
    record = _read_json(source / OURS)
    try:
        prefix = _prefix(config, tensor, backbone, PrefixMeta(**record["meta"]))
        if not isinstance(prefix.meta.method, dict):
            raise TypeError(f"meta.method is {prefix.meta.method!r}")
        expected = str(record["digest"])
        same = prefix.digest == expected
    except (KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(
            f"{OURS} is not what save_peft writes",
            seen=f"{source / OURS}: {error}",
            expected="digest and meta of a prefix",
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


def unflattened(flat: Tensor, backbone: Backbone, layers: int | None = None) -> Tensor:
    """The decoder's `[L, 2, H, P, D]` of PEFT's tensor, which has `layers` (default: L). Raises
    WrongShape."""
    facts = backbone.facts.stacks[DECODER]
    layers = facts.layers if layers is None else layers
    width = layers * 2 * facts.heads * facts.head_dim
    if flat.ndim != 2 or flat.shape[1] != width or not len(flat) or layers < facts.layers:
        raise _does_not_fit(
            flat,
            f"[P, {width}] = [P, {layers} layers x 2 x {facts.heads} key-value heads x "
            f"{facts.head_dim}], of at least {facts.layers} layers",
        )
    parts = flat.view(len(flat), layers, 2, facts.heads, facts.head_dim)
    return parts.permute(1, 2, 3, 0, 4).contiguous()


def _read_by_pairs(layers: int, count: int) -> list[int]:
    """The layers of PEFT's tensor (it has `count`) that it hands to each layer of an
    encoder-decoder model's decoder: it lists them twice, takes two for each and drops the second
    (PEFT 0.21)."""
    return [2 * layer % count for layer in range(layers)]


def _for_pairs(kv_L2HPD: Tensor) -> Tensor:
    """The layers in the order from which PEFT picks them again. Of an even number it would read
    half of them twice and the rest never, so that a layer more is written, which nothing reads."""
    layers = len(kv_L2HPD)
    count = layers + 1 - layers % 2
    spread = torch.zeros((count, *kv_L2HPD.shape[1:]), dtype=kv_L2HPD.dtype)
    spread[_read_by_pairs(layers, count)] = kv_L2HPD.detach().cpu()
    return spread


def _task(backbone: Backbone) -> str:
    return CAUSAL_TASK if backbone.facts.decoder_start_id is None else PAIR_TASK


def _check_expressible(prefix: Prefix, backbone: Backbone) -> None:
    """Raise WrongMethod where PEFT's files have no place for this prefix."""
    for refused, what, seen, expected, fix in (
        _kv_limits(prefix, backbone) if prefix.kv else _embedding_limits(prefix, backbone)
    ):
        if refused:
            raise WrongMethod(
                f"PEFT cannot hold {what}",
                seen=seen,
                expected=expected,
                fix=f"train with {fix}, or keep the prefix in its own file",
            )


def _warn_of_window(prefix: Prefix, backbone: Backbone) -> None:
    config = backbone.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    _, settings = get_layer_types_and_kwargs(config)
    windows = [own["sliding_window"] for own in settings if own.get("sliding_window")]
    if windows and prefix.kv and not prefix.seen.windowed:
        warnings.warn(
            f"in PEFT this prefix leaves the sliding window: beyond {min(windows)} tokens it "
            "computes something else; train with method.visibility=window for the same",
            stacklevel=3,
        )


_Limit = tuple[bool, str, object, object, str]  # refused, what, seen, expected, fix


def _kv_limits(prefix: Prefix, backbone: Backbone) -> list[_Limit]:
    stacks = ", ".join(sorted(prefix.kv))
    beyond, only = "a prefix beyond a decoder's self-attention", f"stacks {DECODER}"
    layers, every = len(next(iter(prefix.kv.values()))), backbone.facts.stacks[DECODER].layers
    some, infix = "a prefix on some layers only", "virtual tokens that the prompt does not see"
    decoder = "method.stacks=[decoder]"
    return [
        (stacks != DECODER, beyond, f"stacks {stacks}", only, decoder),
        _unmoved(backbone),
        (layers != every, some, f"method.layers={layers}", f"all {every}", "method.layers=all"),
        (prefix.seen.infix, infix, "method.placement=infix", "prefix", "method.placement=prefix"),
    ]


def _unmoved(backbone: Backbone) -> _Limit:
    """An answer begins at position P in PEFT; a few decoders cannot be told so."""
    what = "keys and values for this model, whose decoder counts its positions itself"
    moved = backbone.moves_answers
    return (not moved, what, type(backbone.model).__name__, "BART or T5", "method.type=prompt")


def _embedding_limits(prefix: Prefix, backbone: Backbone) -> list[_Limit]:
    members, layout = len(prefix.embeddings), prefix.meta.layout
    around = prefix.arrangement(backbone.template)
    elsewhere = around.anchors > 0 or around.in_front != prefix.num_virtual_tokens
    what = "virtual tokens that are not all in front, nor words beside them"
    in_front = front(prefix.num_virtual_tokens).text
    return [
        (members > 1, "an ensemble", f"method.ensemble={members}", 1, "method.ensemble=1"),
        (elsewhere, what, layout, in_front, "that template"),
    ]


def _kv_config(kv: Tensor) -> dict[str, Any]:
    layers, _, heads, _, dim = kv.shape
    return {
        "peft_type": PREFIX,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }


def _embedding_config(prefix: Prefix, backbone: Backbone) -> dict[str, Any]:
    """Layers and heads are in no formula of these methods, but PEFT wants them, and does not find
    them where a model's own configuration nests them (T5Gemma)."""
    method, width = prefix.meta.method, prefix.embeddings[0].shape[1]
    facts = backbone.facts.stacks[DECODER]
    sizes = {
        "num_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "token_dim": width,
    }
    if method.get("type") != "ptuning":
        return {"peft_type": PROMPT, **sizes}
    return {
        "peft_type": PTUNING,
        **sizes,
        "encoder_reparameterization_type": "LSTM" if method.get("encoder") == "lstm" else "MLP",
        "encoder_hidden_size": method.get("encoder_hidden_size", width),
    }


def _prefix(config: dict[str, Any], tensor: Tensor, backbone: Backbone, meta: PrefixMeta) -> Prefix:
    if config["peft_type"] == PREFIX:
        if _task(backbone) == CAUSAL_TASK:
            return Prefix({DECODER: unflattened(tensor, backbone)}, meta)
        kv = unflattened(tensor, backbone, config.get("num_layers"))
        read = _read_by_pairs(backbone.facts.stacks[DECODER].layers, len(kv))
        return Prefix({DECODER: kv[read]}, meta)
    width = backbone.facts.hidden_size
    if tensor.ndim != 2 or tensor.shape[1] != width or not len(tensor):
        raise _does_not_fit(tensor, f"[P, {width}]")
    return Prefix({}, meta, (tensor,))


def _adopted(kind: str, length: int, backbone: Backbone) -> dict[str, Any]:
    """What there is to say of an adapter that says nothing of its origin."""
    layout = "" if kind == PREFIX else front(length).text
    methods: dict[str, dict[str, Any]] = {
        PREFIX: {
            "type": "prefix",
            "num_virtual_tokens": length,
            "visibility": "window",
            **({} if backbone.facts.decoder_start_id is None else {"stacks": [DECODER]}),
        },
        PROMPT: {"type": "prompt", "num_virtual_tokens": length},
        PTUNING: {"type": "ptuning", "template": layout},
    }
    return {
        "method": {**methods[kind], "imported_from": "peft"},
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "template_digest": backbone.template.digest,
        "layout": layout,
    }


def _does_not_fit(tensor: Tensor, expected: str) -> WrongShape:
    return WrongShape(
        "the PEFT adapter does not fit the backbone",
        seen=f"{TENSOR} {tuple(tensor.shape)}",
        expected=expected,
        fix="load the backbone that the adapter was trained on",
    )


def _check_config(config: dict[str, Any], backbone: Backbone) -> None:
    kind, task = config.get("peft_type"), _task(backbone)
    if kind not in (PREFIX, PROMPT, PTUNING):
        raise WrongMethod(
            "the PEFT adapter is of another method",
            seen=kind,
            expected=f"{PREFIX}, {PROMPT} or {PTUNING}",
            fix="train the adapter with one of these",
        )
    if config.get("task_type") not in (None, task):
        raise WrongMethod(
            "the PEFT adapter is of another kind of model",
            seen=f"task_type {config['task_type']}",
            expected=task,
            fix="load the backbone that the adapter was trained on",
        )
    if kind == PREFIX and not backbone.moves_answers:
        raise WrongMethod(
            "PEFT's Prefix Tuning moves an answer's positions, which this model counts itself",
            seen=f"{kind} of {type(backbone.model).__name__}",
            expected=f"{PROMPT} or {PTUNING}, or another model",
            fix="train the adapter with one of these, or train the prefix here",
        )
    # At the input PEFT keeps one copy or two of an encoder-decoder model; as a cache always two.
    counts = (1,) if task == CAUSAL_TASK else (2,) if kind == PREFIX else (1, 2)
    if _copies(config, backbone) not in counts:
        raise WrongMethod(
            "the PEFT adapter is of an encoder-decoder model"
            if task == CAUSAL_TASK
            else "the PEFT adapter is not one that PEFT makes for this kind of model",
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
    if kind == PREFIX:
        _check_geometry(config, backbone)


def _check_geometry(config: dict[str, Any], backbone: Backbone) -> None:
    """Raise WrongShape where what PEFT says of layers and heads is not the backbone's: another
    model's values can have as many columns. PEFT keeps as many layers of an encoder-decoder model
    as its encoder has."""
    facts, pairs = backbone.facts.stacks[DECODER], _task(backbone) == PAIR_TASK
    wanted = {
        "num_layers": facts.layers,
        "num_attention_heads": facts.heads,
        "token_dim": facts.heads * facts.head_dim,
    }
    for name, count in wanted.items():
        seen = config.get(name)
        more = pairs and name == "num_layers" and _is_count(seen) and seen > count
        if seen is not None and not more and not (_is_count(seen) and seen == count):
            raise WrongShape(
                "the PEFT adapter does not fit the backbone",
                seen=f"{name} {seen!r}",
                expected=f"at least {count}" if pairs and name == "num_layers" else count,
                fix="load the backbone that the adapter was trained on",
            )


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _copies(config: dict[str, Any], backbone: Backbone) -> int | None:
    """How many stacks PEFT means the adapter for; unsaid: all that the model has. None: it says
    nothing that is a number."""
    said = config.get("num_transformer_submodules")
    if said is None:
        return 1 if _task(backbone) == CAUSAL_TASK else 2
    return said if _is_count(said) else None


def _rows(config: dict[str, Any], backbone: Backbone) -> int | None:
    """How many rows the tensor has; None: nothing says so. Of virtual tokens at the input PEFT
    keeps P for each stack, and reads the first P."""
    length, copies = config.get("num_virtual_tokens"), _copies(config, backbone)
    if not _is_count(length) or copies is None:
        return None
    return length * (1 if config["peft_type"] == PREFIX else copies)


def _check_owner(meta: PrefixMeta, user_key: str | None, prefix_name: str | None) -> None:
    if user_key is not None and meta.user_key != user_key:
        raise WrongUser(
            "the adapter belongs to another user",
            seen=meta.user_key,
            expected=user_key,
            fix="give the directory of the user who is meant; ptuning.user_key makes keys of ids",
        )
    if prefix_name is not None and meta.prefix_name != prefix_name:
        raise WrongUser(
            "the adapter has another name",
            seen=meta.prefix_name,
            expected=prefix_name,
            fix="give the directory of that name",
        )


def _read_tensor(source: Path, config: dict[str, Any], backbone: Backbone) -> Tensor:
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
            expected=f"{TENSOR} in safetensors",
            fix="save the adapter again",
        ) from error
    if set(tensors) != {TENSOR} or not torch.is_floating_point(tensors[TENSOR]):
        raise WrongShape(
            "the PEFT adapter does not hold one tensor of keys and values, or of embeddings",
            seen={name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()},
            expected=f"{TENSOR} [P, L * 2 * H * D] or [P, E]",
            fix="give an adapter of Prefix Tuning, Prompt Tuning or P-Tuning alone",
        )
    tensor, length = tensors[TENSOR], config.get("num_virtual_tokens")
    rows = tensor.shape[0] if tensor.ndim else 0
    if not _is_count(length) or length < 1 or rows != _rows(config, backbone):
        raise WrongShape(
            "the PEFT adapter's weights have another length than its configuration says",
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
        "the PEFT adapter's file holds no JSON object",
        seen=seen,
        expected="what PEFT or save_peft writes",
        fix="save the adapter again",
    )


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False).encode("utf-8")
