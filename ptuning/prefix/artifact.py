"""The prefix file: one user's prefix with what it belongs to. Safetensors, no pickle.

The bytes are a pure function of the training (no times, no metrics), so their SHA-256, the
digest, is the prefix's identity everywhere. Loading refuses a file of another backbone,
user, shape or method.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ptuning.data.encode import Template
from ptuning.data.layout import Arrangement, Layout
from ptuning.errors import (
    CorruptArtifact,
    MethodError,
    WrongBackbone,
    WrongMethod,
    WrongShape,
    WrongUser,
)
from ptuning.methods import METHODS, AnyMethod
from ptuning.methods.base import Method
from ptuning.model.batch import EMBEDDINGS, PackPrefix, Visibility
from ptuning.model.facts import DECODER, Facts
from ptuning.system.files import write_atomic
from ptuning.types import Config

if TYPE_CHECKING:  # it brings in Transformers
    from ptuning.model.backbone import Backbone

FORMAT = "1"
_RESTORE = "restore the file from a backup or train the user again"
_METHODS = tuple(METHODS)
_ANY_METHOD: TypeAdapter[Method] = TypeAdapter(AnyMethod)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXT_FIELDS = (
    "format",
    "backbone",
    "backbone_fingerprint",
    "template_digest",
    "user_key",
    "prefix_name",
    "data_digest",
    "training_digest",
)


class ArtifactConfig(Config):
    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the values in a prefix file"
    )


@dataclass(frozen=True, kw_only=True)
class PrefixMeta:
    """What a prefix belongs to: a pure function of its training."""

    method: dict[str, Any]
    backbone: str
    backbone_fingerprint: str
    template_digest: str
    user_key: str
    prefix_name: str = "default"
    data_digest: str = ""
    training_digest: str = ""
    layout: str = ""  # where embeddings stand among a row's tokens (data/layout.py)
    format: str = FORMAT


@dataclass(frozen=True)
class Prefix:
    """One user's prefix: keys and values, or embeddings of virtual tokens at the input.

    `kv[stack]` is `[K, 2, H, P, D]`, keys as after rotary embedding, of the stack's top K
    layers. `embeddings` are `[P, E]`, one for each member of an ensemble.
    """

    kv: dict[str, Tensor]
    meta: PrefixMeta
    embeddings: tuple[Tensor, ...] = ()

    @property
    def num_virtual_tokens(self) -> int:
        if self.embeddings:
            return len(self.embeddings[0])
        return int(next(iter(self.kv.values())).shape[-2])

    @property
    def members(self) -> tuple[dict[str, Tensor], ...]:
        """What answers together, each as `batch.PackPrefix` has it without U."""
        if self.embeddings:
            return tuple({EMBEDDINGS: values} for values in self.embeddings)
        return (self.kv,)

    @property
    def combine(self) -> str:
        """How an ensemble answers: `mean` or `vote` (methods/prompt.py)."""
        return str(self.meta.method.get("combine", "mean"))

    @property
    def seen(self) -> Visibility:
        if self.embeddings:
            return Visibility(windowed=True)
        method = self.meta.method
        return Visibility(
            infix=method.get("placement") == "infix",
            windowed=method.get("visibility") == "window",
        )

    def arrangement(self, template: Template) -> Arrangement:
        """The ids that stand around a prompt with this prefix."""
        if not self.meta.layout:
            return Arrangement()
        return Layout.parse(self.meta.layout).bind(template)

    @cached_property
    def _bytes(self) -> bytes:
        tensors = {"kv" if s == DECODER else f"kv.{s}": kv for s, kv in self.kv.items()}
        if len(self.embeddings) == 1:
            tensors[EMBEDDINGS] = self.embeddings[0]
        else:
            tensors |= {f"{EMBEDDINGS}.{n}": values for n, values in enumerate(self.embeddings)}
        texts = {name: getattr(self.meta, name) for name in _TEXT_FIELDS}
        if self.meta.layout:
            texts["layout"] = self.meta.layout
        texts["method"] = json.dumps(self.meta.method, sort_keys=True)
        stored = {name: values.detach().cpu().contiguous() for name, values in tensors.items()}
        return _canonical(save_safetensors(stored, texts))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prefix file, lower-case hex."""
        return hashlib.sha256(self._bytes).hexdigest()

    def to_bytes(self) -> bytes:
        """The prefix file's bytes."""
        return self._bytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the prefix file; a reader or a crash never meets half of it."""
        return write_atomic(path, self._bytes)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backbone: Backbone,
        *,
        user_key: str | None = None,
        prefix_name: str | None = None,
        digest: str | None = None,
    ) -> Prefix:
        """Read and check a prefix file. Raises CorruptArtifact, WrongBackbone, WrongUser,
        WrongShape or WrongMethod, each saying what was seen and expected."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise CorruptArtifact(
                "the prefix file cannot be read", seen=str(error), fix="check the path"
            ) from error
        return cls.from_bytes(
            data, backbone, user_key=user_key, prefix_name=prefix_name, digest=digest
        )

    @classmethod
    def from_bytes(
        cls,
        data: bytes,
        backbone: Backbone,
        *,
        user_key: str | None = None,
        prefix_name: str | None = None,
        digest: str | None = None,
    ) -> Prefix:
        """As `load`, from bytes already read."""
        seen = hashlib.sha256(data).hexdigest()
        if digest is not None and seen != digest:
            raise CorruptArtifact(
                "the prefix file is not the one that was asked for",
                seen=seen,
                expected=digest,
                fix=_RESTORE,
            )
        prefix = _parse(data)
        # The digest stays that of the file, also where another version wrote its header.
        vars(prefix)["_bytes"] = data
        prefix.check(backbone)
        meta = prefix.meta
        if user_key is not None and meta.user_key != user_key:
            raise WrongUser(
                "the prefix belongs to another user",
                seen=meta.user_key,
                expected=user_key,
                fix="give the file of the user who is meant; ptuning.user_key makes keys of ids",
            )
        if prefix_name is not None and meta.prefix_name != prefix_name:
            raise WrongUser(
                "the prefix has another name",
                seen=meta.prefix_name,
                expected=prefix_name,
                fix="give the file of that name",
            )
        return prefix

    def check(self, backbone: Backbone) -> None:
        """Raise unless this prefix was trained on this backbone and has its shape."""
        meta = self.meta
        if meta.backbone_fingerprint != backbone.fingerprint:
            raise WrongBackbone(
                "the prefix was trained on another backbone",
                seen=f"{meta.backbone} ({meta.backbone_fingerprint[:12]})",
                expected=f"{backbone.name} ({backbone.fingerprint[:12]})",
                fix="load the backbone it was trained on, or train the user on this one",
            )
        if meta.template_digest != backbone.template.digest:
            raise WrongBackbone(
                "the prefix was trained with another tokenizer or template",
                seen=meta.template_digest[:12],
                expected=backbone.template.digest[:12],
                fix="load the backbone with the template of the training (data.template)",
            )
        expected = self._checked_method(backbone.facts).shapes(backbone.facts)
        for member in self.members:
            seen = {name: tuple(values.shape) for name, values in member.items()}
            if seen != expected:
                raise WrongShape(
                    "the prefix's stacks, layers or sizes do not fit the backbone and its method",
                    seen=seen,
                    expected=expected,
                    fix="load the backbone it was trained on, or train the user on this one",
                )
        self.check_finite()

    def check_finite(self) -> None:
        """Raise CorruptArtifact where a value is not finite: fp16 holds none beyond 65504."""
        for member in self.members:
            for name, values in member.items():
                if not bool(torch.isfinite(values).all()):
                    raise CorruptArtifact(
                        "the prefix holds values that are not finite",
                        seen=f"{int((~values.isfinite()).sum())} of {values.numel()} in {name}, "
                        f"as {values.dtype}",
                        expected="finite values",
                        fix="train the user again, at a lower learning rate or with another "
                        "artifact.dtype, or keep the prefix that was served before",
                    )

    def _method(self) -> Method:
        """The method as its settings say. Raises WrongMethod."""
        settings = {key: value for key, value in self.meta.method.items() if key != "imported_from"}
        try:
            return _ANY_METHOD.validate_python(settings)
        except (ValidationError, MethodError) as error:
            raise WrongMethod(
                "the prefix was made by a method that this version cannot apply",
                seen=self.meta.method,
                expected="settings of " + ", ".join(_METHODS),
                fix="update ptuning if the prefix is newer, or train the user again",
            ) from error

    def _checked_method(self, facts: Facts) -> Method:
        """The method, which this backbone can do and which makes prefixes like this one."""
        method = self._method()
        try:
            method.check(facts)
        except MethodError as error:
            raise WrongBackbone(
                f"the prefix is of a method that this backbone cannot do: {error.message}",
                seen=error.seen,
                expected=error.expected,
                fix=error.fix,
            ) from error
        layout = "" if method.layout is None else method.layout.text
        if (self.meta.layout, len(self.members)) != (layout, method.members):
            raise WrongMethod(
                "the prefix is not what its method makes",
                seen=f"layout {self.meta.layout!r}, {len(self.members)} members",
                expected=f"layout {layout!r}, {method.members} members",
                fix=_RESTORE,
            )
        return method


def make_prefix(
    members: Sequence[dict[str, Tensor]], meta: PrefixMeta, config: ArtifactConfig | None = None
) -> Prefix:
    """A prefix of what was trained, in the configured dtype."""
    dtype = _DTYPES[(config or ArtifactConfig()).dtype]
    stored = [
        {name: values.detach().cpu().to(dtype) for name, values in member.items()}
        for member in members
    ]
    if EMBEDDINGS in stored[0]:
        return Prefix({}, meta, tuple(member[EMBEDDINGS] for member in stored))
    return Prefix(stored[0], meta)


def pack_prefix(prefixes: Sequence[Prefix], backbone: Backbone) -> PackPrefix:
    """All members of prefixes of one kind, one after another, as slots; fp32."""
    members = [member for prefix in prefixes for member in prefix.members]
    tensors = {
        name: torch.stack([member[name].float() for member in members]).to(backbone.device)
        for name in members[0]
    }
    return PackPrefix(tensors, prefixes[0].seen)


def training_digest(*parts: object) -> str:
    """SHA-256 of all that decides a training's result: settings, data, backbone, seed."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with its header in sorted order.

    The writer keeps metadata in a hash map, whose order differs from process to process; a
    digest needs one order. Offsets in the header are relative, so only its length matters.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _parse(data: bytes) -> Prefix:
    try:
        tensors = load_safetensors(data)
        size = int.from_bytes(data[:8], "little")
        texts = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise _broken(
            "not a safetensors file, or cut short", f"{len(data)} bytes: {error}"
        ) from error
    if texts.get("format") != FORMAT:
        raise WrongMethod(
            "not a prefix file of a format this version reads",
            seen=texts.get("format"),
            expected=FORMAT,
            fix="check that the file is a ptuning prefix; update ptuning if it is newer",
        )
    missing = [name for name in (*_TEXT_FIELDS, "method") if name not in texts]
    if missing:
        raise _broken("the prefix file lacks metadata", f"no {', '.join(missing)}")
    try:
        method = json.loads(texts["method"])
    except ValueError as error:
        raise _broken("the prefix file's method is not JSON", str(error)) from error
    if not isinstance(method, dict):
        raise _broken("the prefix file's method is not an object", texts["method"])
    if method.get("type") not in _METHODS:
        raise WrongMethod(
            "the prefix was made by a method this version cannot apply",
            seen=method.get("type"),
            expected=", ".join(_METHODS),
            fix=_RESTORE,
        )
    kv, embeddings = _sorted_out(tensors)
    if embeddings:
        _check_layout(texts.get("layout"))
    elif texts.get("layout"):
        raise WrongShape(
            "the prefix file has a layout of virtual tokens at the input, but keys and values",
            seen=texts["layout"],
            expected="embeddings, or no layout",
            fix=_RESTORE,
        )
    fields = (*_TEXT_FIELDS, *(["layout"] if "layout" in texts else []))
    return Prefix(
        kv, PrefixMeta(method=method, **{name: texts[name] for name in fields}), embeddings
    )


def _check_layout(text: str | None) -> None:
    try:
        Layout.parse(text or "")
    except MethodError as error:
        raise _broken(
            "the prefix file does not say where its virtual tokens stand",
            f"layout {text!r}: {error}",
        ) from error


def _broken(what: str, seen: str) -> CorruptArtifact:
    return CorruptArtifact(what, seen=seen, expected="a file that Prefix.save wrote", fix=_RESTORE)


def _sorted_out(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """A prefix file's keys and values by stack, or its members' embeddings in order."""
    kv = {
        DECODER if name == "kv" else name.removeprefix("kv."): tensor
        for name, tensor in tensors.items()
        if name == "kv" or name.startswith("kv.")
    }
    count = len(tensors) - len(kv)
    names = [EMBEDDINGS] if count == 1 else [f"{EMBEDDINGS}.{n}" for n in range(count)]
    if (
        bool(kv) == bool(count)
        or any(name not in tensors for name in names)
        or not all(_is_kv(values) for values in kv.values())
        or not all(_is_embedding(tensors[name]) for name in names)
    ):
        raise WrongShape(
            "the prefix file does not hold keys and values, or embeddings, and only these",
            seen={name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()},
            expected="kv [K, 2, H, P, D] or embeddings [P, E], with P > 0",
            fix=_RESTORE,
        )
    return kv, tuple(tensors[name] for name in names)


def _is_embedding(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and len(tensor) > 0 and torch.is_floating_point(tensor)


def _is_kv(tensor: Tensor) -> bool:
    return tensor.ndim == 5 and tensor.shape[3] > 0 and torch.is_floating_point(tensor)
