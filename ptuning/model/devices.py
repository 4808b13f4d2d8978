"""Where and how a backbone runs here: device, dtype, attention kernel, free memory."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn import functional

from ptuning.errors import ConfigError
from ptuning.model import attention as attention_module

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(device: str) -> torch.device:
    """The named device, which need not exist on this machine; `auto` picks one that does."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise _no_device(device, error) from error


def usable_device(device: str) -> torch.device:
    """As `choose_device`. Raises ConfigError if this machine cannot use the device."""
    chosen = choose_device(device)
    try:
        torch.empty(1, device=chosen)
    except (
        RuntimeError,
        AssertionError,
        ImportError,
    ) as error:  # raised by builds without this backend
        raise _no_device(device, error) from error
    return chosen


def _no_device(device: str, error: Exception) -> ConfigError:
    return ConfigError(
        "no such device",
        seen=f"{device!r}: {str(error).splitlines()[0]}",
        expected="auto, cpu, cuda, cuda:1, …",
        fix="leave backbone.device at auto",
    )


def choose_attention(kind: str, device: torch.device, model_class: type | None = None) -> str:
    """The named kernel. `auto` is eager on a CPU, where its backward pass is faster than that of
    SDPA with a mask (infra/decisions.md), and for models that do not support SDPA."""
    if kind in attention_module.KINDS:
        return kind
    if kind != "auto":
        raise ConfigError(
            "no such attention",
            seen=repr(kind),
            expected="auto, " + ", ".join(attention_module.KINDS),
            fix="leave backbone.attention at auto",
        )
    with_sdpa = device.type != "cpu" and getattr(model_class, "_supports_sdpa", True)
    return "sdpa" if with_sdpa else "eager"


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The named dtype. `auto` is bfloat16 on a GPU that supports it. On a CPU it is measured:
    bfloat16 makes the same product four times faster on some and ten times slower on others."""
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ConfigError(
            "no such backbone dtype",
            seen=repr(dtype),
            expected="auto, " + ", ".join(_DTYPES),
            fix="leave backbone.dtype at auto",
        )
    if device.type == "cuda":
        # Not measured: launch time would dominate a product small enough for a probe.
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    faster = _probe(torch.float32, device) > 1.3 * _probe(torch.bfloat16, device)
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


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, or None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
