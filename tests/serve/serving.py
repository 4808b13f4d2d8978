"""A tiny random Llama with a byte-level tokenizer, prefixes for it, and an oracle."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_backbones import as_groups
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptuning.champions import ChampionRef, publish
from ptuning.methods.prefix import PrefixTuning
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import RowPrefix
from ptuning.model.facts import DECODER, keys_name
from ptuning.model.groups import split_groups
from ptuning.prefix.artifact import Prefix, PrefixMeta, make_prefix
from ptuning.prefix.ready import Member, ReadyPrefix
from ptuning.store import Store, prefix_path
from ptuning.types import user_key
from serve.engine.engine import Engine, HeldPrefix, Request
from serve.events import Delta, Event, Failed, Finished, PrefixInfo, Started

SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIALS[0],
        additional_special_tokens=list(SPECIALS[1:]),
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def save_llama(directory: Path, *, seed: int = 0, positions: int = 512) -> Path:
    """Save a model with 2 layers, 4 heads of 8 and 2 key-value heads. Its weights are large enough
    for clear differences between tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIALS) + 256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def random_kv(backbone: Backbone, length: int, seed: int) -> torch.Tensor:
    """Random `[L, 2, H, P, D]`, large enough to change the model's answers."""
    generator = torch.Generator().manual_seed(seed)
    layers, *rest = backbone.facts.kv_shapes(length)[keys_name(DECODER, 0)]
    return 2 * torch.randn((layers, 2, *rest), generator=generator).to(backbone.dtype)


def member_of(backbone: Backbone, kv_L2HPD: torch.Tensor) -> Member:
    """Keys and values `[L, 2, H, P, D]` in the form of the engine's rows."""
    return Member(split_groups(as_groups(kv_L2HPD), backbone.facts, 0))


def make_held_prefix(backbone: Backbone, length: int, seed: int) -> HeldPrefix:
    info = PrefixInfo(name="default", version=str(seed), digest=f"{seed:064x}")
    member = member_of(backbone, random_kv(backbone, length, seed))
    return HeldPrefix(info=info, ready=ReadyPrefix((member,)))


def kv_of(prefix: HeldPrefix | None) -> torch.Tensor | None:
    """The `[L, 2, H, P, D]` of a prefix made of keys and values."""
    if prefix is None:
        return None
    return torch.stack([torch.stack(pair) for pair in prefix.ready.members[0].layers[DECODER]])


def prefix_file(
    backbone: Backbone,
    user: str,
    *,
    length: int = 4,
    seed: int = 1,
    name: str = "default",
    key: str | None = None,
) -> Prefix:
    """A user's prefix as a run would save it. `key` is the user's key in a salted store."""
    meta = PrefixMeta.of(
        backbone,
        PrefixTuning(num_virtual_tokens=length),
        user_key=key or user_key(user),
        prefix_name=name,
        data_digest="d",
        training_digest=f"t{seed}",
    )
    return make_prefix([as_groups(random_kv(backbone, length, seed))], meta)


def oracle(
    backbone: Backbone, prompt: Sequence[int], kv: torch.Tensor | None, max_tokens: int
) -> list[int]:
    """The greedy tokens of one row alone, without a cache: each step computes the whole row."""
    ids, out = list(prompt), []
    for _ in range(max_tokens):
        row = torch.tensor([ids])
        prefix = (
            None
            if kv is None
            else RowPrefix({DECODER: tuple((layer[None, 0], layer[None, 1]) for layer in kv)})
        )
        tokens = Tokens.of_mask(torch.ones_like(row), len(ids))
        logits = backbone.step(row, tokens, prefix, None)
        token = int(logits[0].argmax())
        out.append(token)
        if token == backbone.template.end_token_id:
            break
        ids.append(token)
    return out


@dataclass
class Listener:
    """Collects the events of one request until the last."""

    events: queue.SimpleQueue[Event]

    @classmethod
    def new(cls) -> Listener:
        return cls(queue.SimpleQueue())

    def wait(self, timeout_s: float = 30.0) -> list[Event]:
        out: list[Event] = []
        while not out or not isinstance(out[-1], Finished | Failed):
            out.append(self.events.get(timeout=timeout_s))
        return out

    def wait_for_start(self, timeout_s: float = 30.0) -> Event:
        return self.events.get(timeout=timeout_s)


def text_of(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def started_of(events: Sequence[Event]) -> Started:
    return next(event for event in events if isinstance(event, Started))


MakeRequest = Callable[..., tuple[Request, Listener]]


class Files:
    """A store whose prefix files are published as champions."""

    def __init__(self, directory: Path) -> None:
        self.store = Store(directory)
        self._versions: Counter[str] = Counter()
        self.generation = 0  # the last one published here

    def path(self, prefix: Prefix, user: str | None = None) -> Path:
        return Path(self.store.path(prefix_path(user or prefix.meta.user_key, prefix.digest)))

    def promote(
        self, prefix: Prefix, *, as_user: str | None = None, as_name: str | None = None
    ) -> ChampionRef:
        """Write and publish a prefix; with `as_user` or `as_name`, under a false user or name."""
        user = as_user or prefix.meta.user_key
        prefix.save(self.path(prefix, user))
        self._versions[user] += 1
        ref = ChampionRef(prefix.digest, str(self._versions[user]))
        name = (user, as_name or prefix.meta.prefix_name)
        changes = {name: ref}
        self.generation = publish(self.store, prefix.meta.backbone_fingerprint, changes)
        return ref


def make_engine(backbone: Backbone, **settings: int) -> Engine:
    values = {"max_rows": 4, "max_queue": 100, "prefill_tokens": 64, **settings}
    return Engine(backbone, **values)  # type: ignore[arg-type]


def expected_text(backbone: Backbone, request: Request) -> str:
    tokens = oracle(backbone, request.prompt, kv_of(request.prefix), request.max_tokens)
    return backbone.template.decode(tokens)


class Gate:
    """Holds the engine before its next decoding step, so that a test decides which requests run."""

    def __init__(self, engine: Engine) -> None:
        self._decode = engine.runner.decode
        self.steps = threading.Semaphore(0)
        engine.runner.decode = self.decode  # type: ignore[method-assign]

    def decode(self, tokens: Sequence[int], columns: Sequence[int]) -> torch.Tensor:
        assert self.steps.acquire(timeout=30)
        return self._decode(tokens, columns)

    def open(self) -> None:
        self.steps.release(10**6)
