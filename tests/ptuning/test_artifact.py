"""A prefix file depends only on its training, and is refused wherever it does not belong."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save as save_safetensors
from tiny_backbones import FAMILIES, as_groups, as_layers, build, random_kv
from tiny_model import make_tokenizer

from ptuning.errors import (
    ArtifactError,
    CorruptArtifact,
    PTuningError,
    WrongBackbone,
    WrongMethod,
    WrongShape,
    WrongUser,
)
from ptuning.generation import generate
from ptuning.methods.prefix import PrefixTuning
from ptuning.model.backbone import Backbone
from ptuning.model.facts import DECODER, keys_name, values_name
from ptuning.prefix.artifact import ArtifactConfig, Prefix, PrefixMeta, make_prefix, training_digest
from ptuning.types import user_key

P = 4
KEYS, VALUES = keys_name(DECODER, 0), values_name(DECODER, 0)


def meta_for(backbone: Backbone, /, **changes: Any) -> PrefixMeta:
    meta = PrefixMeta.of(
        backbone,
        PrefixTuning(num_virtual_tokens=P),
        user_key=user_key("alice"),
        prefix_name="work",
        data_digest="d" * 64,
        training_digest=training_digest("a", 1),
    )
    return replace(meta, **changes)


def prefix_for(backbone: Backbone, /, seed: int = 1, **changes: Any) -> Prefix:
    kv = random_kv(backbone, P, seed)[0]
    return make_prefix([as_groups(kv)], meta_for(backbone, **changes))


def rewrite(prefix: Prefix, change: Callable[[dict[str, Any], dict[str, str]], None]) -> bytes:
    """The prefix's file with changed tensors and metadata, written by safetensors."""
    texts, tensors = prefix.meta.to_texts(), {**prefix.tensors}
    change(tensors, texts)
    return save_safetensors(tensors, texts)


@contextmanager
def expect_refusal(kind: type[ArtifactError]) -> Iterator[None]:
    """Expect an error of this class that says what was seen and survives pickling."""
    with pytest.raises(kind) as caught:
        yield
    error = caught.value
    assert type(error) is kind
    assert error.seen is not None
    assert str(error.seen) in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert (again.message, again.seen, again.expected, again.fix) == (
        error.message,
        error.seen,
        error.expected,
        error.fix,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_saved_prefix_comes_back_with_its_values_meta_and_digest(
    backbone: Backbone, tmp_path: Path, dtype: Any
) -> None:
    kv = random_kv(backbone, P, 1)[0]
    prefix = make_prefix([as_groups(kv)], meta_for(backbone), ArtifactConfig(dtype=dtype))
    path = prefix.save(tmp_path / "new" / "folder" / "p.safetensors")
    again = Prefix.load(
        path,
        backbone,
        user_key=user_key("alice"),
        prefix_name="work",
        digest=prefix.digest,
    )
    assert torch.equal(as_layers(again.tensors), kv.to(getattr(torch, dtype)))
    assert as_layers(again.tensors).dtype == getattr(torch, dtype)
    assert again.meta == prefix.meta
    assert again.digest == prefix.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert again.num_virtual_tokens == P
    assert again.save(tmp_path / "copy").read_bytes() == path.read_bytes()


def test_the_file_is_plain_safetensors_with_a_tensor_kv(backbone: Backbone, tmp_path: Path) -> None:
    prefix = prefix_for(backbone)
    with safe_open(str(prefix.save(tmp_path / "p")), framework="pt") as file:
        assert sorted(file.keys()) == [KEYS, VALUES]
        assert torch.equal(file.get_tensor(KEYS), prefix.tensors[KEYS])
        assert file.get_tensor(KEYS).shape == (2, 2, P, 8)  # [L, H, P, D]
        texts = file.metadata()
    assert texts["user_key"] == user_key("alice")
    assert texts["backbone_fingerprint"] == backbone.fingerprint
    assert json.loads(texts["method"])["num_virtual_tokens"] == P
    assert json.loads(texts["layers"]) == {"decoder.0": [1, 0]}  # from the top, the lowest first


# The identity of every registered prefix depends on this value.
GOLDEN = "7b798d68f9499237c5c4a6adbd0d8dbf404c28380eb26f9f41dd3e4b5f9147c9"
_DIGEST_SCRIPT = """
import torch
from ptuning.methods.prefix import PrefixTuning
from ptuning.prefix.artifact import PrefixMeta, make_prefix
meta = PrefixMeta(
    method=PrefixTuning(num_virtual_tokens=2, stacks=("decoder",)), layers=(("decoder.0", (1, 0)),),
    backbone="b \\u00e9", backbone_fingerprint="f" * 64, template_digest="t" * 64,
    user_key="u" * 52, data_digest="d", training_digest="g",
)
keys = torch.arange(32, dtype=torch.float32).reshape(2, 2, 2, 4)
digest = make_prefix([{"decoder.0.keys": keys, "decoder.0.values": keys + 32}], meta).digest
print(digest)
"""


def test_the_digest_is_the_same_in_every_process_and_version() -> None:
    """The safetensors writer alone would order the metadata differently at each call."""
    for _ in range(20):
        scope: dict[str, Any] = {}
        exec(_DIGEST_SCRIPT, scope)
        assert scope["digest"] == GOLDEN


@pytest.mark.slow
def test_three_processes_give_the_same_digest() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _DIGEST_SCRIPT],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": os.getcwd()},
        )
        for seed in range(3)
    ]
    assert [run.communicate(timeout=240)[0].strip() for run in runs] == [GOLDEN] * 3


def test_every_part_of_a_prefix_is_in_its_digest(backbone: Backbone) -> None:
    prefixes = [prefix_for(backbone), prefix_for(backbone, seed=2)]
    others: dict[str, Any] = {
        "method": PrefixTuning(num_virtual_tokens=P, dropout=0.1),
        "layers": (("decoder.0", (0,)),),
    }
    for name in set(vars(meta_for(backbone))) - {"format"}:
        prefixes.append(prefix_for(backbone, **{name: others.get(name, "other")}))
    assert len({prefix.digest for prefix in prefixes}) == len(prefixes)
    assert prefix_for(backbone).digest == prefixes[0].digest


def test_a_prefix_cannot_be_changed(backbone: Backbone) -> None:
    """Changing the tensors that it was made of, or that it hands out, does not change it."""
    kv = random_kv(backbone, P, 1)[0]
    prefix = make_prefix([as_groups(kv)], meta_for(backbone))
    values, digest = as_layers(prefix.tensors), prefix.digest
    rows = ["the quick brown fox", "hello there"]
    answers = generate(backbone, rows, [prefix, prefix], max_new_tokens=6)
    kv.zero_()
    for tensors in (prefix.tensors, *prefix.members):
        for tensor in tensors.values():
            tensor.zero_()
    with pytest.raises(TypeError):
        prefix.tensors[KEYS] = values[:, 0]  # type: ignore[index]
    with pytest.raises(AttributeError):
        prefix.meta = meta_for(backbone)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        prefix.digest = "0" * 64
    assert torch.equal(as_layers(prefix.tensors), values)
    assert prefix.digest == digest == hashlib.sha256(prefix.to_bytes()).hexdigest()
    assert generate(backbone, rows, [prefix, prefix], max_new_tokens=6) == answers


def test_prefixes_are_equal_where_their_digests_are(backbone: Backbone) -> None:
    one, same, other = prefix_for(backbone), prefix_for(backbone), prefix_for(backbone, seed=2)
    read = Prefix.from_bytes(one.to_bytes(), backbone)
    assert one == same == read == pickle.loads(pickle.dumps(one))
    assert one != other
    assert one != one.digest
    assert other not in [one, same]
    assert {one: "first", same: "second", other: "third"} == {read: "second", other: "third"}


def test_a_prefix_is_shown_without_its_values(backbone: Backbone) -> None:
    prefix = prefix_for(backbone, method=PrefixTuning(num_virtual_tokens=P, init_text="my secret"))
    shown = repr(prefix)
    assert shown == str(prefix)
    assert shown == (
        f"Prefix(prefix, P=4, user={user_key('alice')[:4]}…, digest={prefix.digest[:4]}…)"
    )


def test_a_prefix_of_another_backbone_is_refused(backbone: Backbone) -> None:
    with expect_refusal(WrongBackbone):
        Prefix.from_bytes(prefix_for(backbone, backbone_fingerprint="0" * 64).to_bytes(), backbone)
    with expect_refusal(WrongBackbone):
        prefix_for(backbone).check(build(FAMILIES["gpt2"]()))


def test_a_prefix_of_another_template_or_tokenizer_is_refused(
    backbone: Backbone, tokenizer: Any
) -> None:
    prefix = prefix_for(backbone)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    chatty = Backbone(
        backbone.model, tokenizer, name=backbone.name, fingerprint=backbone.fingerprint
    )
    with expect_refusal(WrongBackbone):
        Prefix.from_bytes(prefix.to_bytes(), chatty)


def test_a_prefix_of_another_user_or_name_is_refused(backbone: Backbone) -> None:
    data = prefix_for(backbone).to_bytes()
    with expect_refusal(WrongUser):
        Prefix.from_bytes(data, backbone, user_key=user_key("bob"))
    with expect_refusal(WrongUser):
        Prefix.from_bytes(data, backbone, prefix_name="default")
    with expect_refusal(WrongUser):
        Prefix.from_bytes(data, backbone, user_key="")


def test_another_file_than_the_one_asked_for_is_refused(backbone: Backbone) -> None:
    one, two = prefix_for(backbone), prefix_for(backbone, seed=2)
    with expect_refusal(CorruptArtifact):
        Prefix.from_bytes(two.to_bytes(), backbone, digest=one.digest)


def test_the_digest_is_of_the_files_bytes_whoever_wrote_its_header(backbone: Backbone) -> None:
    prefix = prefix_for(backbone)
    data = rewrite(prefix, lambda tensors, texts: None)
    again = Prefix.from_bytes(data, backbone)
    assert again.digest == hashlib.sha256(data).hexdigest()
    assert again.to_bytes() == data
    if data != prefix.to_bytes():
        with expect_refusal(CorruptArtifact):
            Prefix.from_bytes(data, backbone, digest=prefix.digest)


@pytest.mark.parametrize(
    "shape",
    [(3, 2, P, 8), (2, 1, P, 8), (2, 2, P + 1, 8), (2, 2, P, 16), (2, 2, P), (P, 8)],
    ids=str,
)
@pytest.mark.parametrize("name", [KEYS, VALUES])
def test_keys_and_values_of_another_shape_are_refused(
    backbone: Backbone, shape: tuple[int, ...], name: str
) -> None:
    def change(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
        tensors[name] = torch.zeros(shape)

    with expect_refusal(WrongShape):
        Prefix.from_bytes(rewrite(prefix_for(backbone), change), backbone)


def _no_keys(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors["keys"] = tensors.pop(KEYS)


def _no_tensors(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors.clear()


def _no_virtual_tokens(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors[KEYS] = tensors[KEYS][:, :, :0].contiguous()


def _whole_numbers(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors[KEYS] = tensors[KEYS].to(torch.int64)


def _another_tensor(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors["weights"] = torch.ones(3)


def _another_stack(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
    tensors["encoder.0.keys"] = tensors[KEYS].clone()


@pytest.mark.parametrize(
    "change",
    [_no_keys, _no_tensors, _no_virtual_tokens, _whole_numbers, _another_tensor, _another_stack],
)
def test_a_file_with_other_tensors_is_refused(
    backbone: Backbone, change: Callable[[dict[str, Any], dict[str, str]], None]
) -> None:
    with expect_refusal(WrongShape):
        Prefix.from_bytes(rewrite(prefix_for(backbone), change), backbone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(backbone: Backbone, value: float) -> None:
    def change(tensors: dict[str, Any], _texts: dict[str, str]) -> None:
        tensors[VALUES][1, 1, 2, 3] = value

    with expect_refusal(CorruptArtifact):
        Prefix.from_bytes(rewrite(prefix_for(backbone), change), backbone)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("format", "1", WrongMethod),
        ("format", None, WrongMethod),
        ("method", json.dumps({"type": "lora"}), WrongMethod),
        ("method", json.dumps({}), WrongMethod),
        ("layout", "{p:4}{prompt}{completion}", WrongMethod),
        ("layers", json.dumps({"decoder.0": [0, 1]}), WrongShape),
        ("layers", json.dumps({"encoder.0": [1, 0]}), WrongShape),
        ("layers", "[1, 0]", CorruptArtifact),
        ("layers", None, WrongShape),
        ("method", "{not json", CorruptArtifact),
        ("method", "[1, 2]", CorruptArtifact),
        ("method", None, CorruptArtifact),
        ("user_key", None, CorruptArtifact),
        ("training_digest", None, CorruptArtifact),
        ("template_digest", "0" * 64, WrongBackbone),
        ("backbone_fingerprint", "", WrongBackbone),
    ],
)
def test_tampered_or_missing_metadata_is_refused(
    backbone: Backbone, name: str, value: str | None, kind: type[ArtifactError]
) -> None:
    def change(_tensors: dict[str, Any], texts: dict[str, str]) -> None:
        if value is None:
            del texts[name]
        else:
            texts[name] = value

    with pytest.raises(kind) as caught:
        Prefix.from_bytes(rewrite(prefix_for(backbone), change), backbone)
    assert type(caught.value) is kind


def test_a_file_cut_short_anywhere_is_refused(backbone: Backbone) -> None:
    data = prefix_for(backbone).to_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    sizes = {0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) - 1}
    for size in sorted(sizes | set(range(0, len(data), 61))):
        with pytest.raises(CorruptArtifact):
            Prefix.from_bytes(data[:size], backbone)
    with pytest.raises(CorruptArtifact):
        Prefix.from_bytes(data + b"\0", backbone)


@hypothesis_settings(max_examples=60)
@given(data=st.data())
def test_damaged_bytes_raise_an_artifact_error_or_keep_the_digests_promise(
    backbone: Backbone, data: st.DataObject
) -> None:
    prefix = prefix_for(backbone)
    octets = bytearray(prefix.to_bytes())
    at = data.draw(st.integers(0, len(octets) - 1))
    octets[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptArtifact):
        Prefix.from_bytes(bytes(octets), backbone, digest=prefix.digest)
    try:
        Prefix.from_bytes(bytes(octets), backbone)
    except ArtifactError:
        return
    assert hashlib.sha256(octets).hexdigest() != prefix.digest


@given(octets=st.binary(max_size=200))
def test_random_bytes_are_refused(backbone: Backbone, octets: bytes) -> None:
    with pytest.raises(CorruptArtifact):
        Prefix.from_bytes(octets, backbone)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle in a prefix file was executed",))


def test_a_pickle_is_refused_and_not_executed(backbone: Backbone, tmp_path: Path) -> None:
    bomb = pickle.dumps(_Bomb())
    with expect_refusal(CorruptArtifact):
        Prefix.from_bytes(bomb, backbone)
    torch.save({KEYS: torch.zeros(2, 2, P, 8)}, tmp_path / "p.safetensors")
    with expect_refusal(CorruptArtifact):
        Prefix.load(tmp_path / "p.safetensors", backbone)


def test_safetensors_of_something_else_are_refused(
    backbone: Backbone, tiny_model_dir: Path
) -> None:
    with pytest.raises(WrongMethod):
        Prefix.load(tiny_model_dir / "model.safetensors", backbone)
    with pytest.raises(WrongMethod):
        Prefix.from_bytes(save_safetensors({KEYS: torch.zeros(2, 2, P, 8)}), backbone)


def test_a_path_without_a_file_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    with expect_refusal(CorruptArtifact):
        Prefix.load(tmp_path / "nothing", backbone)
    with expect_refusal(CorruptArtifact):
        Prefix.load(tmp_path, backbone)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = prefix_for(backbone).save(tmp_path / "p.safetensors")
    before = path.read_bytes()

    def fail(*_args: Any) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space"):
        prefix_for(backbone, seed=2).save(path)
    with pytest.raises(OSError, match="no space"):
        prefix_for(backbone, seed=2).save(tmp_path / "other.safetensors")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.safetensors"]
    assert path.read_bytes() == before


def test_errors_of_every_kind_keep_their_fields_through_pickling() -> None:
    def kinds(root: type[PTuningError]) -> list[type[PTuningError]]:
        return [root, *(kind for child in root.__subclasses__() for kind in kinds(child))]

    for kind in kinds(PTuningError):
        if kind.__module__ != PTuningError.__module__:
            continue  # the service tests its errors itself
        error = kind("it broke", seen=1, expected=(2, 3), fix="mend it", user_key="abc")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error) == "it broke; seen: 1; expected: (2, 3); to fix: mend it"
        assert again.fields == {"user_key": "abc"}


@given(one=st.text(), two=st.text())
def test_user_keys_are_safe_names_and_differ_for_ids_that_differ(one: str, two: str) -> None:
    if any("\ud800" <= letter <= "\udfff" for letter in one + two):
        return
    key = user_key(one)
    assert len(key) == 52
    assert set(key) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert (key == user_key(two)) == (one == two)


def test_user_keys_never_change_by_themselves() -> None:
    """Stores and registries contain them."""
    digest = hmac.digest(b"", "Zoë".encode(), "sha256")
    assert user_key("Zoë") == base64.b32encode(digest).decode().rstrip("=").lower()
    assert user_key("alice") != user_key("Alice") != user_key("alice ")
