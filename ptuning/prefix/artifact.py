"""The prefix file: one user's prefix and its metadata. Safetensors, no pickle.

A Prefix is an immutable value made of its file's bytes. Their SHA-256, the digest, identifies it
everywhere, and tensors are returned as copies. The bytes are a pure function of the training (no
times, no metrics). The method in the metadata determines which tokens attend to the prefix and how
ensemble members are combined. Loading refuses a prefix of another backbone, user, shape or method.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ptuning.data.encode import Template
from ptuning.data.layout import Arrangement
from ptuning.errors import (
    CorruptArtifact,
    MethodError,
    WrongBackbone,
    WrongMethod,
    WrongShape,
    WrongUser,
)
from ptuning.methods.base import Method
from ptuning.methods.catalogue import METHODS, parse_method
from ptuning.model.batch import PackPrefix
from ptuning.system.files import write_atomic
from ptuning.types import Config

if TYPE_CHECKING:  # it imports Transformers
    from ptuning.model.backbone import Backbone

FORMAT = "2"
_RESTORE = "restore the file from a backup or train the user again"
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
    SECTION: ClassVar[str] = "artifact"

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="dtype of the values in a prefix file"
    )


@dataclass(frozen=True, kw_only=True)
class PrefixMeta:
    """A prefix's metadata, a pure function of its training.

    `layers`: the layers of each group of keys and values, counted from the top, lowest layer first
    (`(("decoder.0", (1, 0)),)`). `imported_from`: the tool that trained it, if not this one.
    """

    method: Method
    backbone: str
    backbone_fingerprint: str
    template_digest: str
    user_key: str
    layers: tuple[tuple[str, tuple[int, ...]], ...] = ()
    prefix_name: str = "default"
    data_digest: str = ""
    training_digest: str = ""
    imported_from: str = ""
    format: str = FORMAT

    @classmethod
    def of(cls, backbone: Backbone, method: Method, *, user_key: str, **more: str) -> PrefixMeta:
        """The metadata of a prefix that `method` makes for `backbone`; `more` sets other fields."""
        layers = backbone.facts.layers_of(method.shapes(backbone.facts))
        return cls(
            method=method,
            layers=tuple(sorted(layers.items())),
            backbone=backbone.name,
            backbone_fingerprint=backbone.fingerprint,
            template_digest=backbone.template.digest,
            user_key=user_key,
            **more,
        )

    def to_texts(self) -> dict[str, str]:
        """The metadata as the prefix file stores it."""
        texts = {name: getattr(self, name) for name in _TEXT_FIELDS}
        texts["method"] = json.dumps(self.method.model_dump(mode="json"), sort_keys=True)
        if self.layers:
            texts["layers"] = json.dumps(dict(self.layers), sort_keys=True)
        if self.method.layout is not None:
            texts["layout"] = self.method.layout.text
        if self.imported_from:
            texts["imported_from"] = self.imported_from
        return texts

    @classmethod
    def from_texts(cls, texts: Mapping[str, str]) -> PrefixMeta:
        """The inverse of `to_texts`. Raises CorruptArtifact or WrongMethod."""
        if texts.get("format") != FORMAT:
            raise WrongMethod(
                "not a prefix file in a format that this version reads",
                seen=texts.get("format"),
                expected=FORMAT,
                fix="check that the file is a ptuning prefix; update ptuning if it is newer",
            )
        missing = [name for name in (*_TEXT_FIELDS, "method") if name not in texts]
        if missing:
            raise _broken("the prefix file lacks metadata", f"no {', '.join(missing)}")
        method = _read_method(texts["method"])
        layout = "" if method.layout is None else method.layout.text
        if texts.get("layout", "") != layout:
            raise WrongMethod(
                "the prefix's layout is not that of its method",
                seen=f"layout {texts.get('layout', '')!r}",
                expected=f"layout {layout!r}",
                fix=_RESTORE,
            )
        return cls(
            method=method,
            layers=_read_layers(texts.get("layers", "{}")),
            imported_from=texts.get("imported_from", ""),
            **{name: texts[name] for name in _TEXT_FIELDS},
        )


@dataclass(frozen=True)
class _Contents:
    """The contents of a prefix file without the values."""

    meta: PrefixMeta
    shapes: tuple[dict[str, tuple[int, ...]], ...]  # one dict per ensemble member


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """One user's prefix, an immutable value; prefixes with the same digest are equal.

    Made by `make_prefix`, `Prefix.load` or `Prefix.from_bytes`. Its tensors are
    `decoder.0.keys` `[Lg, H, P, Dk]` and `decoder.0.values` `[Lg, H, P, Dv]` for each group of each
    stack (of the group's top Lg layers, with rotary embedding applied to the keys), or `embeddings`
    `[P, E]`. An ensemble has those of each member, as `0.embeddings`.
    """

    _data: bytes

    def __post_init__(self) -> None:
        self._contents  # noqa: B018 - refuse unreadable bytes at construction

    @cached_property
    def _contents(self) -> _Contents:
        return _read_contents(self._data)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the prefix file, lower-case hex."""
        return hashlib.sha256(self._data).hexdigest()

    @property
    def meta(self) -> PrefixMeta:
        return self._contents.meta

    @property
    def method(self) -> Method:
        return self.meta.method

    @property
    def num_virtual_tokens(self) -> int:
        return self.method.num_virtual_tokens

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one member's tensors, as from `Method.shapes`."""
        return dict(self._contents.shapes[0])

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by its name in the file, on the CPU: a read-only mapping to new copies, so
        changing them does not change the prefix."""
        return MappingProxyType(load_safetensors(self._data))

    @property
    def members(self) -> tuple[dict[str, Tensor], ...]:
        """Copies of each member's tensors, in the form of `batch.PackPrefix` without U."""
        return tuple(_split_members(self.tensors))

    def arrangement(self, template: Template) -> Arrangement:
        """The ids to put before and after a prompt with this prefix."""
        layout = self.method.layout
        return Arrangement() if layout is None else layout.bind(template)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, Prefix) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Prefix({self.method.type}, P={self.num_virtual_tokens}, "
            f"user={self.meta.user_key[:4]}…, digest={self.digest[:4]}…)"
        )

    def __reduce__(self) -> tuple[type[Prefix], tuple[bytes]]:
        return Prefix, (self._data,)

    def to_bytes(self) -> bytes:
        """The prefix file's bytes."""
        return self._data

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the prefix file atomically: neither a reader nor a crash leaves half of it."""
        return write_atomic(path, self._data)

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
        """Read and check a prefix file; `user_key`, `prefix_name` and `digest` are checked if
        given. Raises CorruptArtifact, WrongBackbone, WrongUser, WrongShape or WrongMethod, each
        with what was seen and expected."""
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
        actual = hashlib.sha256(data).hexdigest()
        if digest is not None and actual != digest:
            raise CorruptArtifact(
                "the prefix file is not the one that was asked for",
                seen=actual,
                expected=digest,
                fix=_RESTORE,
            )
        prefix = cls(data)
        prefix.check(backbone)
        check_owner(prefix.meta, "prefix", user_key, prefix_name)
        return prefix

    def check(self, backbone: Backbone) -> None:
        """Raise an ArtifactError unless this prefix was trained on this backbone and fits it."""
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
        self._check_method(backbone)
        self.check_finite()

    def _check_method(self, backbone: Backbone) -> None:
        """Raise an ArtifactError unless the backbone supports the method, and the method makes
        prefixes of this form."""
        facts, contents = backbone.facts, self._contents
        try:
            self.method.check(facts)
        except MethodError as error:
            raise WrongBackbone(
                f"the prefix is of a method that this backbone does not support: {error.message}",
                seen=error.seen,
                expected=error.expected,
                fix=error.fix,
            ) from error
        if len(contents.shapes) != self.method.members:
            raise WrongMethod(
                "the prefix has the wrong number of members for its method",
                seen=f"{len(contents.shapes)} members",
                expected=f"{self.method.members} members",
                fix=_RESTORE,
            )
        shapes = self.method.shapes(facts)
        expected = (shapes, facts.layers_of(shapes))
        for member_shapes in contents.shapes:
            if (actual := (member_shapes, dict(self.meta.layers))) != expected:
                raise WrongShape(
                    "the prefix's stacks, layers or sizes do not fit the backbone and its method",
                    seen=actual,
                    expected=expected,
                    fix="load the backbone it was trained on, or train the user on this one",
                )

    def check_finite(self) -> None:
        """Raise CorruptArtifact if a value is not finite (in fp16 none can be beyond 65504)."""
        for name, values in self.tensors.items():
            if not bool(torch.isfinite(values).all()):
                raise CorruptArtifact(
                    "the prefix has values that are not finite",
                    seen=f"{int((~values.isfinite()).sum())} of {values.numel()} in {name}, "
                    f"as {values.dtype}",
                    expected="finite values",
                    fix="train the user again with a lower learning rate or another "
                    "artifact.dtype, or keep the prefix that was served before",
                )


def check_owner(meta: PrefixMeta, what: str, user_key: str | None, prefix_name: str | None) -> None:
    """Raise WrongUser unless a prefix belongs to this user and has this name; None: any. `what` is
    the word for it in the message: "prefix" or "adapter"."""
    if user_key is not None and meta.user_key != user_key:
        raise WrongUser(
            f"the {what} belongs to another user",
            seen=meta.user_key,
            expected=user_key,
            fix=f"use the {what} of the intended user; ptuning.user_key computes a user's key",
        )
    if prefix_name is not None and meta.prefix_name != prefix_name:
        raise WrongUser(
            f"the {what} has another name",
            seen=meta.prefix_name,
            expected=prefix_name,
            fix=f"use the {what} with that name",
        )


def make_prefix(
    members: Sequence[Mapping[str, Tensor]], meta: PrefixMeta, config: ArtifactConfig | None = None
) -> Prefix:
    """Make a prefix from each member's trained tensors, copied in the configured dtype."""
    dtype = _DTYPES[(config or ArtifactConfig()).dtype]
    tensors = {
        name if len(members) == 1 else f"{number}.{name}": values.detach().to(
            "cpu", dtype, copy=True
        )
        for number, member in enumerate(members)
        for name, values in member.items()
    }
    stored = {name: values.contiguous() for name, values in tensors.items()}
    return Prefix(_canonical(save_safetensors(stored, meta.to_texts())))


def pack_prefix(prefixes: Sequence[Prefix], backbone: Backbone) -> PackPrefix:
    """Stack the members of prefixes of the same form as slots, one after another; fp32."""
    members = [member for prefix in prefixes for member in prefix.members]
    tensors = {
        name: torch.stack([member[name].float() for member in members]).to(backbone.device)
        for name in members[0]
    }
    return PackPrefix(tensors, backbone.facts, prefixes[0].method.visibility)


def training_digest(*parts: object) -> str:
    """SHA-256 of everything that determines a training's result: settings, data, backbone, seed."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _canonical(data: bytes) -> bytes:
    """The same safetensors file with a sorted header.

    The writer keeps metadata in a hash map, whose order differs between processes, but the digest
    needs a fixed order. The offsets in the header are relative to its end, so it may change length.
    """
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(
        json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _read_contents(data: bytes) -> _Contents:
    try:
        tensors = load_safetensors(data)
        size = int.from_bytes(data[:8], "little")
        texts = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as error:
        raise _broken(
            "not a safetensors file, or cut short", f"{len(data)} bytes: {error}"
        ) from error
    meta = PrefixMeta.from_texts(texts)
    members = _split_members(tensors)
    same_names = len({frozenset(member) for member in members}) == 1
    complete = same_names and sum(map(len, members)) == len(tensors)
    if not complete or not all(map(_is_values, tensors.values())):
        raise WrongShape(
            "the prefix file must contain keys and values, or embeddings, and nothing else",
            seen={name: (tuple(t.shape), str(t.dtype)) for name, t in tensors.items()},
            expected="keys and values [L, H, P, D] or embeddings [P, E] of each member, P > 0",
            fix=_RESTORE,
        )
    shapes = [{name: tuple(t.shape) for name, t in member.items()} for member in members]
    return _Contents(meta, tuple(shapes))


def _split_members(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each ensemble member, whose names begin with its number; a prefix that is not
    an ensemble has one member without a number."""
    members: dict[int, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        number, _, rest = name.partition(".")
        member, key = (int(number), rest) if number.isdecimal() else (0, name)
        members.setdefault(member, {})[key] = tensors[name]
    return [members[number] for number in sorted(members)]


def _is_values(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and torch.is_floating_point(tensor)


def _read_method(text: str) -> Method:
    try:
        settings = json.loads(text)
    except (ValueError, TypeError) as error:
        raise _broken("the prefix file's method is not JSON", str(error)) from error
    if not isinstance(settings, dict):
        raise _broken("the prefix file's method is not an object", text)
    try:
        return parse_method(settings)
    except (ValidationError, MethodError) as error:
        raise WrongMethod(
            "the prefix was made by a method that this version cannot apply",
            seen=settings,
            expected="settings of " + ", ".join(METHODS),
            fix="update ptuning if the prefix is newer, or train the user again",
        ) from error


def _read_layers(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    try:
        groups = json.loads(text).items()
        return tuple((str(name), tuple(map(int, layers))) for name, layers in groups)
    except (ValueError, TypeError, AttributeError) as error:
        raise _broken("the prefix file's layers cannot be read", str(error)) from error


def _broken(what: str, seen: str) -> CorruptArtifact:
    return CorruptArtifact(what, seen=seen, expected="a file that Prefix.save wrote", fix=_RESTORE)
