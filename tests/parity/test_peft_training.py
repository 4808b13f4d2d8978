"""Training equals PEFT's: losses, gradients and whole trainings of single users.

All tests use fp32 and tiny random models. Where PEFT differs, the tests adapt:

- PEFT puts the whole model into training mode, so a backbone with dropout (GPT-2's default) drops
  out while its prefix is trained; ours never does. The comparisons set these rates to zero.
- A batch without supervised tokens has no mean loss: PEFT's loss is NaN and its gradients are zero,
  so AdamW's momentum moves the prefix. Ours makes no update, and PEFT's loop here skips the step.
- PEFT's random initialisation has other standard deviations than ours. The tests copy one side's
  initial parameters to the other.
- Our encoders (P-Tuning, MLP) can start at init words, to which their output is added. PEFT has no
  such start, so encoders start at random here.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import pytest
import torch
from serving import Files
from tiny_backbones import (
    FAMILIES,
    as_groups,
    as_layers,
    build,
    build_model,
    prefix_rows,
    random_ids,
    random_row,
    user_rows,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, Trainer, TrainingArguments

from ptuning.data.encode import IGNORE, Encoded, Template
from ptuning.data.packing import epoch_batches
from ptuning.generation import generate
from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.attention_plan import Tokens
from ptuning.model.backbone import Backbone
from ptuning.model.batch import EMBEDDINGS, PackPrefix
from ptuning.model.facts import DECODER, keys_name, values_name
from ptuning.prefix.artifact import Prefix
from ptuning.prefix.peft_format import flatten_layers, load_peft, unflatten_layers
from ptuning.train.config import BestEpoch, TrainConfig, Trained, UserRows, learning_rate_at
from ptuning.train.packed import train_pack
from ptuning.train.plain import train_user
from ptuning.train.step import LocalDriver, collate, predicted
from serve.config import ServeConfig
from serve.events import Ask
from serve.service import Service

torch.set_num_threads(1)
P = 3
FRONT = f"{{p:{P}}}{{prompt}}{{completion}}"


def keep(tensor: Tensor, _backbone: Backbone) -> Tensor:
    return tensor


def transpose(tensor: Tensor, _backbone: Backbone) -> Tensor:
    return tensor.T


def select_keys(flat: Tensor, backbone: Backbone) -> Tensor:
    return unflatten_layers(flat, backbone)[:, 0]


def select_values(flat: Tensor, backbone: Backbone) -> Tensor:
    return unflatten_layers(flat, backbone)[:, 1]


ToOurs = Callable[[Tensor, Backbone], Tensor]
Names = dict[
    str, tuple[str, ToOurs]
]  # our name: PEFT's name, and the conversion from PEFT's tensor to ours


def linear(ours: str, theirs: str, stack: str = "") -> Names:
    return {
        f"{stack}w{ours}": (f"{theirs}.weight", transpose),
        f"{stack}b{ours}": (f"{theirs}.bias", keep),
    }


def lstm(layers: int) -> Names:
    names: Names = {}
    for layer in range(layers):
        for direction, tail in (("forward", ""), ("backward", "_reverse")):
            for short in ("ih", "hh"):
                ours, theirs = f"lstm{layer}.{direction}", f"{short}_l{layer}{tail}"
                names[f"{ours}.w_{short}"] = (f"lstm_head.weight_{theirs}", transpose)
                names[f"{ours}.b_{short}"] = (f"lstm_head.bias_{theirs}", keep)
    return names


@dataclass(frozen=True)
class Case:
    """One of our methods, PEFT's configuration of it, and the mapping of their parameters."""

    method: Method
    config: Any  # of peft
    names: Names
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 0.05

    def peft_model(self, config: PreTrainedConfig) -> Any:
        """A PEFT model with the weights of a backbone of that configuration. Each needs a separate
        configuration object, since the kind of attention is set in it."""
        made = self.config(task_type="CAUSAL_LM", num_virtual_tokens=P, **self.options)
        return peft.get_peft_model(build_model(config, "eager"), made)


KEYS, VALUES = keys_name(DECODER, 0), values_name(DECODER, 0)
KV: Names = {KEYS: ("embedding.weight", select_keys), VALUES: ("embedding.weight", select_values)}
INPUT: Names = {EMBEDDINGS: ("embedding.weight", keep)}
CASES: dict[str, Case] = {
    "prefix": Case(PrefixTuning(num_virtual_tokens=P, init="random"), peft.PrefixTuningConfig, KV),
    "prefix-words": Case(PrefixTuning(num_virtual_tokens=P), peft.PrefixTuningConfig, KV),
    "prefix-mlp": Case(
        PrefixTuning(
            num_virtual_tokens=P, encoder_hidden_size=8, encoder_input="keys", init="random"
        ),
        peft.PrefixTuningConfig,
        {
            f"{DECODER}.embedding": ("embedding.weight", keep),
            **linear("1", "transform.0", f"{DECODER}."),
            **linear("2", "transform.2", f"{DECODER}."),
        },
        {"prefix_projection": True, "encoder_hidden_size": 8},
        learning_rate=0.01,
    ),
    "embedding-only": Case(
        PrefixTuning(num_virtual_tokens=P, layers="embedding", init="random"),
        peft.PromptTuningConfig,
        INPUT,
    ),
    "prompt": Case(
        PromptTuning(num_virtual_tokens=P, init="random"), peft.PromptTuningConfig, INPUT
    ),
    "prompt-words": Case(PromptTuning(num_virtual_tokens=P), peft.PromptTuningConfig, INPUT),
    "ptuning-lstm": Case(
        PTuning(template=FRONT, encoder="lstm", encoder_hidden_size=6, init="random"),
        peft.PromptEncoderConfig,
        {
            "embedding": ("embedding.weight", keep),
            **lstm(2),
            **linear("1", "mlp_head.0"),
            **linear("2", "mlp_head.2"),
        },
        {
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 6,
            "encoder_num_layers": 2,
        },
        learning_rate=0.01,
    ),
    "ptuning-mlp": Case(
        PTuning(template=FRONT, encoder="mlp", encoder_hidden_size=6, init="random"),
        peft.PromptEncoderConfig,
        {
            "embedding": ("embedding.weight", keep),
            **linear("1", "mlp_head.0"),
            **linear("2", "mlp_head.2"),
            **linear("3", "mlp_head.4"),
        },
        {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": 6},
        learning_rate=0.01,
    ),
    "ptuning-none": Case(
        PTuning(template=FRONT, encoder="none", init="random"), peft.PromptTuningConfig, INPUT
    ),
}


def config_of(family: str) -> PreTrainedConfig:
    config = FAMILIES[family]()
    for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    return config


def of_peft(case: Case, tensors: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """PEFT's parameters, or their gradients, with our names and shapes."""
    assert {theirs for theirs, _ in case.names.values()} == set(tensors)
    return {
        ours: change(tensors[theirs].detach(), backbone)
        for ours, (theirs, change) in case.names.items()
    }


def set_in_peft(case: Case, model: Any, ours: dict[str, Tensor]) -> None:
    assert set(ours) == set(case.names)
    parameters = dict(model.prompt_encoder["default"].named_parameters())
    with torch.no_grad():
        for name, tensor in ours.items():
            theirs, change = case.names[name]
            if change in (select_keys, select_values):
                tensor = flatten_layers(as_layers(ours))
            parameters[theirs].copy_(tensor.T if change is transpose else tensor)


def collate_for_peft(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows padded on the right, as a data collator returns them."""
    longest = max(len(row.input_ids) for row in rows)

    def pad_right(values: Sequence[int], pad: int) -> list[int]:
        return [*values, *[pad] * (longest - len(values))]

    return {
        "input_ids": torch.tensor([pad_right(row.input_ids, 0) for row in rows]),
        "attention_mask": torch.tensor([pad_right([1] * len(row.input_ids), 0) for row in rows]),
        "labels": torch.tensor([pad_right(row.labels, IGNORE) for row in rows]),
    }


def arrange_rows(method: Method, backbone: Backbone, rows: Sequence[Encoded]) -> list[Encoded]:
    if method.layout is None:
        return list(rows)
    return [method.layout.bind(backbone.template).row(row) for row in rows]


def start_of(case: Case, model: Any, words: Sequence[int]) -> dict[str, Tensor] | None:
    """The words' activations or embeddings in a plain model, if the method starts from words."""
    if case.method.start_ids == "none":
        return None
    ids = torch.tensor([words])
    cache: Any = DynamicCache()
    base: Any = model.get_base_model().eval()
    with torch.no_grad():
        base(input_ids=ids, past_key_values=cache, use_cache=True)
        embeddings = base.get_input_embeddings()(ids)[0]
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return {**as_groups(torch.stack(layers)), EMBEDDINGS: embeddings}


def make_rows_of_many_lengths(count: int, seed: int) -> list[Encoded]:
    rows = [random_row(5 + 4 * n, 2 + n, seed + n) for n in range(count - 1)]
    everything = random_ids(6, seed + count)
    return [*rows, Encoded(everything, everything)]  # its first token is supervised too


# (a) Step by step


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("first", ["ours", "pefts"])
def test_every_step_has_pefts_loss_and_gradients(name: str, family: str, first: str) -> None:
    case = CASES[name]
    backbone, model = build(config_of(family)), case.peft_model(config_of(family))
    parameters = dict(model.prompt_encoder["default"].named_parameters())
    start = start_of(case, model, random_ids(P, 1))
    ours = case.method.initial(backbone.facts, start, seed=5).trained
    if first == "ours":
        set_in_peft(case, model, ours)
    else:
        # PEFT's initial values have standard deviation 1: losses are high and gradients large.
        ours = of_peft(case, parameters, backbone)
    model.train()
    trained = {key: p.clone().unsqueeze(0).requires_grad_() for key, p in ours.items()}
    settings = TrainConfig(min_valid_tokens=0, warmup_fraction=0.4, weight_decay=0.05)
    steps = 5
    optimizers = [
        torch.optim.AdamW(params, weight_decay=settings.weight_decay)
        for params in (trained.values(), parameters.values())
    ]
    for step in range(steps):
        rows = make_rows_of_many_lengths(4, seed=10 * step)
        for optimizer in optimizers:
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = learning_rate_at(
                settings, case.learning_rate, step, steps
            )
        pack = PackPrefix(
            case.method.compile(trained, {}, backbone.facts), backbone.facts, case.method.visibility
        )
        batch = collate(arrange_rows(case.method, backbone, rows), backbone.device)
        prefix = pack.of_rows(torch.zeros(len(rows), dtype=torch.long), torch.float32)
        loss = backbone.token_nll(batch, prefix).mean()
        loss.backward()
        theirs = model(**collate_for_peft(rows)).loss
        theirs.backward()
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        gradients = {key: p.grad for key, p in parameters.items() if p.grad is not None}
        for key, expected in of_peft(case, gradients, backbone).items():
            gradient = trained[key].grad
            assert gradient is not None
            assert expected.abs().max() > 0
            torch.testing.assert_close(
                gradient[0],
                expected,
                atol=1e-5 * float(expected.abs().max()),
                rtol=1e-4,
                msg=partial("{}: {}".format, key),
            )
        for optimizer in optimizers:
            optimizer.step()
    for key, expected in of_peft(case, parameters, backbone).items():
        torch.testing.assert_close(trained[key][0].detach(), expected, atol=2e-5, rtol=0)
    assert all(p.grad is None for p in model.get_base_model().parameters())


def test_a_backbones_own_dropout_is_on_in_pefts_training_and_off_in_ours() -> None:
    """Why the comparisons set GPT-2's dropout to zero."""
    case, config = CASES["prefix"], FAMILIES["gpt2"]()
    assert config.resid_pdrop > 0
    backbone, model = build(FAMILIES["gpt2"]()), case.peft_model(config)
    rows = make_rows_of_many_lengths(3, seed=1)
    ours = case.method.initial(backbone.facts, None, seed=5).trained
    set_in_peft(case, model, ours)
    pack = PackPrefix({name: own[None] for name, own in ours.items()}, backbone.facts)
    prefix = pack.of_rows(torch.zeros(len(rows), dtype=torch.long), torch.float32)
    loss = float(backbone.token_nll(collate(rows, backbone.device), prefix).mean())
    with torch.no_grad():
        assert float(model.train()(**collate_for_peft(rows)).loss) != pytest.approx(loss, abs=1e-3)
        assert float(model.eval()(**collate_for_peft(rows)).loss) == pytest.approx(loss, rel=1e-5)


# (b) Whole trainings, user by user


def mask_labels(row: Encoded) -> Encoded:
    return replace(row, labels=[IGNORE] * len(row.labels))


def make_rows_with_answer(answer: int, count: int, seed: int = 0) -> tuple[Encoded, ...]:
    return tuple(
        Encoded([*random_ids(4, seed + n), answer, answer], [IGNORE] * 4 + [answer] * 2)
        for n in range(count)
    )


def users() -> list[UserRows]:
    """Users with many rows, one row, no validation rows, batches without supervised tokens, and
    validation rows that contradict the train rows."""
    alice = user_rows("alice", train=7, valid=3, init_ids=P)
    bob = user_rows("bob", train=1, valid=1, init_ids=P)
    carol = user_rows("carol", train=4, valid=0, init_ids=P)
    silent = user_rows("silent", train=6, valid=2, init_ids=P)
    # At two rows per batch, at least one of three batches has no supervised token.
    rows = (silent.train[0], *map(mask_labels, silent.train[1:5]), silent.train[5])
    contrary = UserRows(
        user_key="contrary",
        seed=1,
        train=make_rows_with_answer(50, 4),
        valid=make_rows_with_answer(120, 2),
        init_ids=(9, 8, 7),
    )
    return [alice, bob, carol, replace(silent, train=rows), contrary]


def train_with_peft(
    case: Case, family: str, backbone: Backbone, settings: TrainConfig, user: UserRows
) -> Trained:
    """Train PEFT's model in a plain loop, with our order of rows and our learning rates."""
    model = case.peft_model(config_of(family))
    start = start_of(case, model, user.init_ids)
    set_in_peft(case, model, case.method.initial(backbone.facts, start, user.seed).trained)
    parameters = list(model.prompt_encoder.parameters())
    peak = settings.learning_rate
    assert peak is not None
    optimizer = torch.optim.AdamW(parameters, weight_decay=settings.weight_decay)
    total = settings.epochs * -(-len(user.train) // settings.batch_size)
    best, result = BestEpoch(settings.patience), Trained(user_key=user.user_key)
    for epoch in range(1, settings.epochs + 1):
        model.train()
        nats, tokens = 0.0, 0
        for batch in epoch_batches(
            len(user.train), settings.batch_size, seed=user.seed, epoch=epoch
        ):
            rows = [user.train[row] for row in batch]
            labels = sum(predicted(row) for row in rows)
            optimizer.param_groups[0]["lr"] = learning_rate_at(settings, peak, result.steps, total)
            result.steps += 1
            if not labels:
                continue
            optimizer.zero_grad()
            loss = model(**collate_for_peft(rows)).loss
            loss.backward()
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            nats, tokens = nats + loss.item() * labels, tokens + labels
        model.eval()
        with torch.no_grad():
            valid = float(model(**collate_for_peft(user.valid)).loss) if user.valid else None
        result.history.append({"epoch": epoch, "train": nats / tokens, "valid": valid})
        is_best, stop = best.see(valid)
        if is_best:
            saved = model.get_prompt_embedding_to_save("default")
            stored = isinstance(model.active_peft_config, peft.PrefixTuningConfig)
            result.members = (
                as_groups(unflatten_layers(saved, backbone)) if stored else {EMBEDDINGS: saved},
            )
        if stop:
            break
    return result


def assert_same(ours: Trained, expected: Trained, atol: float = 5e-5) -> None:
    assert ours.error is None
    assert ours.kv is not None
    assert expected.kv is not None
    assert ours.steps == expected.steps
    assert set(ours.kv) == set(expected.kv)
    for name, values in expected.kv.items():
        torch.testing.assert_close(ours.kv[name], values, atol=atol, rtol=0)
    assert [line["epoch"] for line in ours.history] == [line["epoch"] for line in expected.history]
    for line, wanted in zip(ours.history, expected.history, strict=True):
        for split in ("train", "valid"):
            assert line[split] == (
                None if wanted[split] is None else pytest.approx(wanted[split], abs=atol)
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "llama") for name in CASES]
    + [(name, "gpt2") for name in ("prefix", "prefix-mlp", "prompt", "ptuning-lstm")],
)
def test_a_pack_and_the_plain_trainer_give_every_user_what_peft_gives(
    name: str, family: str
) -> None:
    case, backbone = CASES[name], build(config_of(family))
    settings = TrainConfig(
        min_valid_tokens=0,
        epochs=5,
        batch_size=2,
        patience=1,
        learning_rate=case.learning_rate,
        warmup_fraction=0.2,
        weight_decay=0.02,
        max_grad_norm=0.7,
        tokens_per_microbatch=60,
    )
    packed = LocalDriver(backbone).run(train_pack(backbone, case.method, settings, users()))
    epochs = set()
    for user, ours in zip(users(), packed, strict=True):
        expected = train_with_peft(case, family, backbone, settings, user)
        assert_same(train_user(backbone, case.method, settings, user), expected)
        assert_same(ours, expected)
        epochs.add(len(expected.history))
    assert len(epochs) > 1, "no user stopped before the others"


def test_a_batch_without_labels_moves_pefts_prefix_and_leaves_ours_alone() -> None:
    case, rows = CASES["prefix"], make_rows_of_many_lengths(3, seed=1)
    backbone, model = build(config_of("llama")), case.peft_model(config_of("llama"))
    (parameter,) = model.prompt_encoder.parameters()
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    mute = tuple(mask_labels(row) for row in rows)
    for batch in (rows, mute):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        loss = model(**collate_for_peft(batch)).loss
        loss.backward()
        optimizer.step()
    assert loss.isnan()
    assert not parameter.grad.any()
    assert (parameter - before).abs().max() > 0.01
    user = UserRows(user_key="mute", seed=1, train=mute)
    settings = TrainConfig(
        min_valid_tokens=0, epochs=2, batch_size=2, learning_rate=0.1, weight_decay=0.1
    )
    initial = case.method.initial(backbone.facts, None, user.seed).trained
    (packed,) = LocalDriver(backbone).run(train_pack(backbone, case.method, settings, [user]))
    for trained in (packed, train_user(backbone, case.method, settings, user)):
        assert trained.kv is not None
        assert torch.equal(as_layers(trained.kv), as_layers(initial))


# (c) Trained and saved with PEFT, then answered by both

PROMPTS = ["the quick brown", "hello there, how are you", "fox"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["prefix", "prefix-mlp", "prompt", "ptuning-lstm", "ptuning-mlp"])
def test_a_peft_adapter_trained_with_transformers_trainer_answers_the_same_here(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All prompts in one batch here, one by one in PEFT (see the next test)."""
    # Answers are compared as ids: random bytes are rarely valid text.
    monkeypatch.setattr(Template, "decode", lambda _self, ids: " ".join(map(str, ids)))
    case = CASES[name]
    backbone, model = build(FAMILIES[family]()), case.peft_model(FAMILIES[family]())
    before = model.get_prompt_embedding_to_save("default").clone()
    rows = [{"row": row} for seed in range(3) for row in make_rows_of_many_lengths(3, seed)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda items: collate_for_peft([item["row"] for item in items]),
    ).train()
    assert (model.get_prompt_embedding_to_save("default") - before).abs().max() > 0.01
    model.save_pretrained(str(tmp_path / "adapter"))
    prefix = load_peft(tmp_path / "adapter", backbone, user_key="u" * 52)
    loaded = peft.PeftModel.from_pretrained(
        build_model(FAMILIES[family](), "eager"), str(tmp_path / "adapter")
    )
    ours = generate(backbone, PROMPTS, [prefix] * len(PROMPTS), max_new_tokens=12)
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([backbone.template.encode_prompt(prompt, 512)])
        mask = torch.ones_like(ids)
        with torch.no_grad():
            logits = loaded(input_ids=ids, attention_mask=mask).logits[0, -1]
        here = backbone.step(
            ids,
            Tokens.of_mask(mask, ids.shape[1]),
            prefix_rows(backbone, [prefix]),
            DynamicCache(),
        )[0]
        torch.testing.assert_close(here, logits, atol=1e-5, rtol=1e-5)
        output = loaded.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False
        )
        new = output[0, ids.shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new  # to the end-of-text token
        assert answer == backbone.template.decode(new)
    assert ours != generate(backbone, PROMPTS, [None] * len(PROMPTS), max_new_tokens=12)
    assert serve_answers(backbone, prefix, tmp_path) == ours


def serve_answers(backbone: Backbone, prefix: Prefix, directory: Path) -> list[str]:
    """The service's answers to the prompts, with the prefix as its user's champion."""
    files = Files(directory / "store")
    files.promote(prefix)
    service = Service(ServeConfig(max_rows=4), backbone, files.store)

    async def ask() -> list[Any]:
        asks = [
            Ask(
                id=str(number),
                user_key=prefix.meta.user_key,
                prefix_name=prefix.meta.prefix_name,
                prompt=prompt,
                max_tokens=12,
                temperature=0.0,
                top_p=1.0,
                seed=None,
                stop=(),
            )
            for number, prompt in enumerate(PROMPTS)
        ]
        return await asyncio.gather(*(service.answer(one) for one in asks))

    try:
        answers = asyncio.run(ask())
    finally:
        service.close()
    assert all(one.prefix.digest == prefix.digest for one in answers)
    return [one.text for one in answers]


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_left_padding_shifts_positions_after_pefts_prompt_but_not_after_ours(
    name: str,
) -> None:
    """PEFT puts virtual tokens before the padding and counts the padding in positions, so its
    answer depends on the batch. With Prefix Tuning, `generate` derives positions from the mask, as
    ours always does."""
    case = CASES[name]
    backbone, model = build(config_of("llama")), case.peft_model(config_of("llama")).eval()
    saved = model.get_prompt_embedding_to_save("default")
    tensors = (
        as_groups(unflatten_layers(saved, backbone)) if name == "prefix" else {EMBEDDINGS: saved}
    )
    text = random_ids(6, seed=1)
    pack = PackPrefix(
        {key: own[None] for key, own in tensors.items()}, backbone.facts, case.method.visibility
    )
    prefix = pack.of_rows(torch.tensor([0]), torch.float32)
    virtual_ids = [-1, -2, -3] if name == "prompt" else []
    theirs, ours = [], []
    for padding in (0, 4):
        ids, mask = [0] * padding + text, [0] * padding + [1] * len(text)
        made = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.tensor([mask]),
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        theirs.append(made.logits[0][0])
        real = torch.tensor([[0] * padding + [1] * (len(virtual_ids) + len(text))])
        row = torch.tensor([[0] * padding + virtual_ids + text])
        ours.append(backbone.step(row, Tokens.of_mask(real, row.shape[1]), prefix, None)[0])
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1], ours[0], atol=1e-5, rtol=1e-5)
    moved = (theirs[1] - theirs[0]).abs().max()
    assert moved > 1e-2 if name == "prompt" else moved < 1e-5
