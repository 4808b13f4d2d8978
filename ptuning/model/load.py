"""Load a frozen model with prefix attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import BackboneError, ConfigError, ModelNotFound, OutOfMemory, UnsupportedModel
from ptuning.model import attention as attention_module
from ptuning.model.backbone import Backbone
from ptuning.model.devices import choose_attention, choose_dtype, free_memory, usable_device
from ptuning.model.discover import EXAMPLES
from ptuning.model.facts import CROSS, DECODER, ENCODER, BackboneConfig, Facts, StackFacts
from ptuning.model.fingerprint import fingerprint_of, fingerprint_of_weights
from ptuning.model.locate import Source, locate_model, weight_files
from ptuning.model.quiet import quiet_transformers


def load_tokenizer(source: Source) -> Any:
    """Load only the tokenizer, without weights."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise _not_loadable(source.name, error) from error


def load_template(name: str, kind: TemplateKind = "auto") -> Template:
    """Load a model's prompt template, without its weights."""
    source = locate_model(name)
    config = read_config(source)
    return Template.of(
        load_tokenizer(source),
        kind,
        encoder_decoder=bool(config.is_encoder_decoder),
        vocab_size=getattr(config.get_text_config(), "vocab_size", None),
    )


def outline(name: str) -> Facts:
    """The facts known from a model's configuration alone: stacks, layers, positions. Enough to
    check a method before loading weights; key-value heads and widths are unknown (set to 1)."""
    full_config = read_config(locate_model(name))
    config = full_config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    layers = {DECODER: _layers(config, "decoder_layers", "num_decoder_layers")}
    start = None
    if full_config.is_encoder_decoder:
        # T5Gemma has a configuration for each half.
        reader = getattr(full_config, "encoder", None) or config
        layers[ENCODER] = _layers(reader, "encoder_layers", "num_layers")
        layers[CROSS], start = layers[DECODER], 0
    return Facts(
        stacks={
            stack: StackFacts.of_one_shape(layers=count, heads=1, head_dim=1)
            for stack, count in layers.items()
        },
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=positions,
        decoder_start_id=start,
    )


def _layers(config: Any, *names: str) -> int:
    found = (getattr(config, name, None) for name in (*names, "num_hidden_layers"))
    return int(next(count for count in found if count))


def read_config(source: Source) -> Any:
    """A model's Transformers configuration, without its weights."""
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loadable(source.name, error) from error


def load_backbone(
    model: str | BackboneConfig | torch.nn.Module = "smollm2",
    *,
    tokenizer: Any = None,
    template: TemplateKind = "auto",
    **settings: Any,
) -> Backbone:
    """Load a causal or encoder-decoder language model, frozen, with prefix attention.

    `model` is an alias, a directory, a hub id or a .gguf file; a BackboneConfig; or a loaded
    Transformers model with its `tokenizer`. `settings` are those of BackboneConfig: `dtype`,
    `attention`, `device`, `gradient_checkpointing`. A loaded model is frozen and keeps its dtype
    and device; its fingerprint is of its values in memory, not of the files they came from.
    Raises ModelNotFound, UnsupportedModel, OutOfMemory, ConfigError.

        backbone = ptuning.load_backbone("smollm2", dtype="float32")
        backbone = ptuning.load_backbone(AutoModelForCausalLM.from_pretrained(…), tokenizer=…)
    """
    if isinstance(model, torch.nn.Module):
        return _adopt(model, tokenizer, template, _settings(BackboneConfig(), settings))
    if tokenizer is not None:
        raise ConfigError(
            "a tokenizer was given together with a model's name",
            seen=f"{model!r} and a {type(tokenizer).__name__}",
            expected="just a name, or a loaded model with its tokenizer",
            fix="omit the tokenizer: it is loaded with the model's files",
        )
    config = _settings(model if isinstance(model, BackboneConfig) else None, settings, model)
    source = locate_model(config.name)
    device = usable_device(config.device)
    read = read_config(source)
    kind = choose_attention(config.attention, device, model_class(read))
    dtype = choose_dtype(config.dtype, device)
    _check_memory(source, read, dtype, device)
    loaded = read_model(source, dtype, kind)
    try:
        loaded.to(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the model does not fit on the device", seen=str(error)) from error
    return Backbone(
        loaded,
        load_tokenizer(source),
        name=source.name,
        fingerprint=fingerprint_of(source, read),
        template=template,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _settings(
    config: BackboneConfig | None, settings: dict[str, Any], name: object = None
) -> BackboneConfig:
    """`config`, or the defaults for a model's name, overridden by `settings`."""
    if unknown := sorted(set(settings) - set(BackboneConfig.model_fields)):
        raise ConfigError(
            "load_backbone has no such setting",
            seen=", ".join(unknown),
            expected=", ".join(BackboneConfig.model_fields),
            fix="correct the name, or remove it",
        )
    values = {} if config is None else config.model_dump()
    if config is None:
        values["name"] = name
    return BackboneConfig.model_validate({**values, **settings})


def _adopt(
    model: torch.nn.Module, tokenizer: Any, template: TemplateKind, config: BackboneConfig
) -> Backbone:
    """Make a backbone from a model that the caller has loaded."""
    if tokenizer is None:
        raise ConfigError(
            "a loaded model was given without its tokenizer",
            seen=type(model).__name__,
            expected="load_backbone(model, tokenizer=tokenizer)",
            fix="pass the tokenizer that the model was trained with",
        )
    configurable: Any = model  # nn.Module declares none of the attributes used here
    parameter = next(model.parameters())
    kind = choose_attention(config.attention, parameter.device, type(model))
    name = attention_module.implementation(kind)
    with quiet_transformers():
        try:
            configurable.set_attn_implementation(name)
        except (AttributeError, ValueError) as error:
            raise _without_interface(type(model).__name__, "use another backbone") from error
    return Backbone(
        model,
        tokenizer,
        name=str(getattr(configurable.config, "_name_or_path", "") or type(model).__name__),
        fingerprint=fingerprint_of_weights(model, configurable.config),
        template=template,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def _family(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def model_class(config: Any) -> type | None:
    """The Transformers class that loads a configuration, if there is one."""
    try:
        found: type = _family(config)._model_mapping[type(config)]
    except KeyError:
        return None
    return found


def read_model(source: Source, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """`from_pretrained` with our attention, and with errors that say how to fix them."""
    implementation = attention_module.implementation(attention)
    config = read_config(source)
    try:
        with quiet_transformers():
            loaded: Any = _family(config).from_pretrained(
                source.path,
                dtype=dtype,
                attn_implementation=implementation,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except SafetensorError as error:
        raise ModelNotFound(
            "the model's weights are damaged", seen=f"{source.name}: {error}", fix="fetch it again"
        ) from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the model does not fit on the device", seen=str(error)) from error
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise _not_loadable(source.name, error) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        if refused := _refused_attention(error, attention):
            seen = f"{source.name}, of type {config.model_type}"
            raise _without_interface(seen, refused) from error
        raise _not_loadable(source.name, error) from error
    model, info = loaded
    # Transformers initialises missing weights at random and only warns.
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            "the model's files lack weights that a causal language model needs",
            seen=f"{source.name}: no {', '.join(missing[:3])} ({len(missing)} in all)",
            fix="use the directory of a complete causal language model",
        )
    return model


def _without_interface(seen: str, fix: str) -> UnsupportedModel:
    return UnsupportedModel(
        "the model cannot take a prefix inside its attention",
        seen=seen,
        expected="a model whose attention goes through Transformers' attention interface, "
        f"{EXAMPLES}",
        fix=fix,
    )


def _refused_attention(error: Exception, attention: str) -> str | None:
    """The fix if a model does not support the requested attention; None if the error has another
    cause."""
    text = str(error).lower()
    # Some models look up a class by the name of the attention.
    if isinstance(error, KeyError) and "ptuning_" in text:
        return "use another backbone"
    if "attention" not in text or "support" not in text:
        return None
    other = "" if attention == "eager" else "try backbone.attention=eager, or "
    return f"{other}use another backbone"


def _not_loadable(name: str, error: Exception) -> BackboneError:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return UnsupportedModel(
            "the model needs custom code, and ptuning does not run code that comes with a model",
            seen=name,
            expected=f"a model of a family that Transformers supports, {EXAMPLES}",
            fix="load it yourself and pass the model and its tokenizer to load_backbone",
        )
    if isinstance(error, OSError):
        return ModelNotFound(
            "the model's files cannot be read",
            seen=f"{name}: {text[:300]}",
            expected="files written by save_pretrained",
            fix="check the name; for a hub id, network access and HF_HUB_OFFLINE",
        )
    return UnsupportedModel(
        "Transformers cannot load this as a causal language model",
        seen=f"{name}: {text[:300]}",
        expected=EXAMPLES,
        fix="use another backbone",
    )


def weight_bytes(source: Source, config: Any, dtype: torch.dtype) -> int:
    """Size of a model's weights in a dtype, in bytes, computed from the files that are loaded."""
    files = sum(file.stat().st_size for file in weight_files(Path(source.path)))
    stored = getattr(config, "dtype", None) or torch.float32
    return int(files * dtype.itemsize // stored.itemsize)


def _check_memory(source: Source, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    needed = weight_bytes(source, config, dtype)
    free = free_memory(device)
    if free is not None and needed > free:
        raise OutOfMemory(
            "the model does not fit into free memory",
            seen=f"{needed / 2**30:.1f} GiB of weights as {dtype}, {free / 2**30:.1f} GiB free",
            fix="use backbone.dtype=bfloat16, backbone.sharding=zero3 over more workers, "
            "or a larger machine",
        )
