"""Probe at load time whether a row's logits depend on anything in the batch but the row itself.

Some models couple rows: experts of limited capacity, statistics over the batch, rotary embeddings
that use the longest position in a batch or remember an earlier one. The configuration does not show
this. So a small random copy of the model (two layers, narrow, every threshold lowered) is run: a
short row alone, beside a longer row, and after another batch must give the same logits. The
trade-off: about a second at the first load of a configuration; the result is then cached.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ptuning.errors import UnsupportedModel
from ptuning.model.cache import cache_directory

# The small copy's thresholds and the lengths of rows, in tokens. Each longer row is tried beside a
# short one.
SHORT, ORIGINAL, POSITIONS = 5, 16, 32
WITHIN_ORIGINAL, WITHIN_POSITIONS, BEYOND = 12, 28, 44
TOLERANCE = 1e-3  # of the logits' standard deviation; rounding in fp32 is about 1e-6 of it


@dataclass(frozen=True)
class Isolation:
    """A probe's result: rows are isolated up to `positions` positions (None: as many as the model
    has), unless `coupling` says what differed and by how much."""

    positions: int | None = None
    coupling: str | None = None

    def limit(self, max_positions: int | None) -> int | None:
        """How many positions may be used so that rows stay isolated."""
        limits = [limit for limit in (self.positions, max_positions) if limit is not None]
        return min(limits, default=None)


_known: dict[str, Isolation] = {}


def check_isolation(model: Any) -> Isolation:
    """Probe a model's class and configuration, or reuse the result of an earlier probe.

    Raises UnsupportedModel if rows are coupled at every length, or if no probe can be run.
    """
    digest = _digest(model)
    if digest not in _known:
        _known[digest] = _load_or_probe(digest, model)
    found = _known[digest]
    if found.coupling is not None:
        raise UnsupportedModel(
            "the rows of a batch are not isolated in this model, so one user's prompt could change "
            "another user's answer",
            seen=f"{type(model).__name__}: {found.coupling}",
            expected="logits that depend only on the row's tokens, as in Llama or Mixtral",
            fix="use another backbone",
        )
    return found


def _load_or_probe(digest: str, model: Any) -> Isolation:
    path = cache_directory() / "isolation" / f"{digest}.json"
    try:
        return Isolation(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        found = probe_isolation(model)
    with suppress(OSError):  # without a writable cache, every load probes again
        _write(path, json.dumps(asdict(found)))
    return found


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    attempt = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    attempt.write_text(text)
    attempt.replace(path)


def _digest(model: Any) -> str:
    """Digest of everything that the result depends on: the model's code and configuration, and
    this file."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(f"{type(model).__qualname__} {transformers.__version__}".encode())
    for file in (sys.modules[type(model).__module__].__file__, __file__):
        digest.update(Path(file).read_bytes() if file else b"")
    return digest.hexdigest()


def probe_isolation(model: Any) -> Isolation:
    """Run small copies of a model, with rows beyond one threshold after another."""
    config = model.config
    original = original_positions(config)
    if (coupling := _coupling(model, WITHIN_ORIGINAL)) is not None:
        return Isolation(coupling=coupling)
    if original is not None and (coupling := _coupling(model, WITHIN_POSITIONS)) is not None:
        return Isolation(positions=original)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if _is_rotary(config) and (coupling := _coupling(model, BEYOND)) is not None:
        # If the model has no position limit, there is no safe length.
        return Isolation(positions, None if positions is not None else coupling)
    return Isolation()


def _configs(config: PreTrainedConfig) -> Iterator[Any]:
    """A configuration and all nested ones."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs(value)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """A configuration's rotary embeddings: a single one, or one per layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or ([rope] if rope else [])


def _is_rotary(config: PreTrainedConfig) -> bool:
    return any(_ropes(nested) for nested in _configs(config))


def original_positions(config: PreTrainedConfig) -> int | None:
    """The smallest original position limit among the configuration's rotary embeddings."""
    found = [
        value
        for nested in _configs(config)
        for holder in (vars(nested), *_ropes(nested))
        if isinstance(value := holder.get("original_max_position_embeddings"), int)
    ]
    return min(found, default=None)


def _coupling(model: Any, long: int) -> str | None:
    """How a short row and one of `long` tokens affect each other; None: they do not."""
    small, vocabulary = _small_copy(model)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, vocabulary, (n,), generator=generator) for n in (SHORT, long)]
    alone, beside = _logits(small, rows[:1]), _logits(small, rows)
    long_alone, after = _logits(small, rows[1:]), _logits(small, rows[:1])
    comparisons = {
        "a short row beside a longer one": (beside[0], alone[0]),
        "a long row beside a shorter one": (beside[1], long_alone[0]),
        "a row after another batch": (after[0], alone[0]),
    }
    for name, (changed, expected) in comparisons.items():
        difference = float((changed - expected).abs().max())
        if not difference <= TOLERANCE * max(float(expected.std()), 1e-6):  # true for NaN too
            return f"{name}: logits differ by {difference:.2g}"
    return None


def _logits(model: nn.Module, rows: Sequence[Tensor]) -> list[Tensor]:
    """Logits `[T, V]` of each row, run as one batch padded on the right."""
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs).logits.float()
    return [padded[: len(row)] for padded, row in zip(logits, rows, strict=True)]


def _small_copy(model: Any) -> tuple[nn.Module, int]:
    """A small random model of the same class, and its vocabulary size.

    Some models cannot be made both narrow and shallow; then only one of the two is done.
    """
    errors = []
    for narrow, shallow in ((True, True), (True, False), (False, True)):
        try:
            config = copy.deepcopy(model.config)
            for nested in _configs(config):
                _lower_thresholds(nested)
                _shrink_vocabulary(nested)
                if narrow:
                    _narrow(nested)
                if shallow:
                    _remove_layers(nested)
            config._attn_implementation = "eager"
            small = _make_random(type(model), config)
            _logits(small, [torch.full((SHORT,), 3)])
            return small, int(config.get_text_config().vocab_size)
        except Exception as error:  # noqa: BLE001 - a family's code meets unexpected sizes
            errors.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModel(
        "no small copy of the model could be run, so it is unknown whether it isolates the rows of "
        "a batch",
        seen=f"{type(model).__name__}: {errors[0][:300]}",
        fix="use another backbone",
    )


def _make_random(model_class: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model: nn.Module = model_class(config).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # with the usual 0.02 the logits hardly depend on the input
                parameter.data.normal_(std=0.7 * parameter.shape[-1] ** -0.5)
    return model


def _lower(config: Any, names: Sequence[str], most: int) -> None:
    """Cap integers and lists of integers at `most`, if the configuration has them."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(config, name, min(value, most))
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            setattr(config, name, [min(item, most) for item in value])


def _lower_thresholds(config: Any) -> None:
    """Lower every threshold at which a model changes its behaviour below the long rows' length."""
    positions = POSITIONS if _ropes(config) else max(POSITIONS, BEYOND)
    _lower(config, ("max_position_embeddings",), positions)
    _lower(config, ("original_max_position_embeddings",), ORIGINAL)
    for rope in _ropes(config):
        if "original_max_position_embeddings" in rope:
            rope["original_max_position_embeddings"] = ORIGINAL
    _lower(config, ("sliding_window", "attention_chunk_size"), 4)
    _lower(config, [name for name in vars(config) if "capacity" in name], 1)


def _shrink_vocabulary(config: Any) -> None:
    size = 128
    _lower(config, ("vocab_size", "vocab_size_per_layer_input"), size)
    _lower(config, [name for name in vars(config) if name.endswith("token_id")], 2)


def _narrow(config: Any) -> None:
    """Keep two heads of the same size, and reduce the widths to match."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", 0)
    if not isinstance(heads, int) or hidden % heads:
        return
    width = hidden // heads * 2
    shared = getattr(config, "num_key_value_heads", heads) != heads
    _lower(config, ("num_attention_heads", "decoder_attention_heads"), 2)
    _lower(config, ("num_key_value_heads",), 1 if shared else 2)
    _lower(config, ("hidden_size", "word_embed_proj_dim"), width)
    wide = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    others = ("intermediate_size_mlp", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff")
    _lower(config, (*wide, *others, "n_inner"), 64)


def _remove_layers(config: Any) -> None:
    """Keep two layers, or one of each type if there are more types."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return
    types = getattr(config, "layer_types", None) or []
    kept = sorted({types.index(layer_type) for layer_type in types} | set(range(min(2, count))))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(config, name, [value[n] for n in kept])
    layers = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
    _lower(config, (*layers, "num_layers"), len(kept))
    _lower(config, ("first_k_dense_replace",), 1)
