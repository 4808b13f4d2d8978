"""The tuning methods that tests are parametrised with.

Add entries for each new method. `test_every_method.py` fails if a registered method has no entry,
or none for a kind of test that every method must pass.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning

P = 3


@dataclass(frozen=True)
class Entry:
    """A method with settings, small enough for a tiny model.

    `peft` is PEFT's name of the method; None if PEFT cannot hold it. The flags choose tests:
    `fast`: packed against plain training without the slow tests (all entries run in those).
    `served`: mixed batches in generation and in the service; one entry for each way of answering.
    `pairs`: encoder-decoder models too; requires `served`. `run`: a run, from rows to an answer.
    `rate` is a learning rate with which a tiny model learns within a few epochs. `gain` is the
    required gain, in nats per token, on a token that a user always writes.
    """

    method: Method
    peft: str | None = None
    fast: bool = False
    served: bool = False
    pairs: bool = False
    run: bool = False
    rate: float = 0.1
    gain: float = 0.3

    def __post_init__(self) -> None:
        assert self.served or not self.pairs, "`pairs` requires `served`"

    @property
    def settings(self) -> list[str]:
        """The values for `--set`."""
        values = self.method.model_dump(mode="json")
        return [
            f"method.{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in values.items()
        ]


CATALOGUE: dict[str, Entry] = {
    "direct-words": Entry(
        PrefixTuning(num_virtual_tokens=P), "PREFIX_TUNING", fast=True, served=True, pairs=True
    ),
    "direct-random": Entry(PrefixTuning(num_virtual_tokens=P, init="random"), "PREFIX_TUNING"),
    "longer": Entry(PrefixTuning(num_virtual_tokens=9), "PREFIX_TUNING", served=True),
    "mlp-words": Entry(PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8), "PREFIX_TUNING"),
    "mlp-random": Entry(
        PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8, init="random"),
        "PREFIX_TUNING",
        fast=True,
    ),
    "mlp-keys": Entry(
        PrefixTuning(
            num_virtual_tokens=P, encoder_hidden_size=8, encoder_input="keys", init="random"
        ),
        "PREFIX_TUNING",
    ),
    "top-layer": Entry(PrefixTuning(num_virtual_tokens=P, layers=1), served=True, pairs=True),
    "embedding-only": Entry(
        PrefixTuning(num_virtual_tokens=P, layers="embedding"),
        "PROMPT_TUNING",
        served=True,
        pairs=True,
    ),
    "embedding-only-mlp": Entry(
        PrefixTuning(num_virtual_tokens=P, layers="embedding", encoder_hidden_size=8),
        "PROMPT_TUNING",
    ),
    "infix": Entry(PrefixTuning(num_virtual_tokens=P, placement="infix"), fast=True, served=True),
    "infix-top-layer": Entry(
        PrefixTuning(num_virtual_tokens=6, placement="infix", layers=1), served=True
    ),
    "infix-mlp-top-layer": Entry(
        PrefixTuning(
            num_virtual_tokens=P, placement="infix", layers=1, encoder_hidden_size=8, dropout=0.1
        ),
        run=True,
    ),
    "infix-embedding": Entry(
        PrefixTuning(num_virtual_tokens=P, placement="infix", layers="embedding"), served=True
    ),
    "window": Entry(
        PrefixTuning(num_virtual_tokens=4, sliding_window="respect"),
        "PREFIX_TUNING",
        served=True,
        pairs=True,
    ),
    "encoder": Entry(
        PrefixTuning(num_virtual_tokens=7, stacks=("encoder",)), served=True, pairs=True
    ),
    "cross, decoder": Entry(
        PrefixTuning(num_virtual_tokens=2, stacks=("cross", "decoder"), layers=1),
        served=True,
        pairs=True,
    ),
    "dropout": Entry(PrefixTuning(num_virtual_tokens=P, dropout=0.3), "PREFIX_TUNING"),
    "prompt": Entry(
        PromptTuning(num_virtual_tokens=P), "PROMPT_TUNING", fast=True, served=True, pairs=True
    ),
    "prompt-random": Entry(
        PromptTuning(num_virtual_tokens=P, init="random", dropout=0.2), "PROMPT_TUNING"
    ),
    "prompt-ensemble": Entry(
        PromptTuning(num_virtual_tokens=P, init="random", ensemble=3), fast=True, served=True
    ),
    "prompt-vote": Entry(
        PromptTuning(num_virtual_tokens=4, ensemble=3, combine="vote"), served=True, pairs=True
    ),
    "prompt-labels": Entry(
        PromptTuning(num_virtual_tokens=4, init="labels", ensemble=2, combine="vote"), run=True
    ),
    "ptuning-lstm": Entry(
        PTuning(template="{p:1}{prompt}{p:2}", encoder="lstm", encoder_hidden_size=8),
        fast=True,
        served=True,
        pairs=True,
    ),
    "ptuning-lstm-random": Entry(
        PTuning(template="{p:1}{prompt}{p:2}", encoder="lstm", encoder_hidden_size=8, init="random")
    ),
    "ptuning-mlp": Entry(
        PTuning(template="{prompt}{p:3}", encoder_hidden_size=8, init="random"), served=True
    ),
    "ptuning-front": Entry(PTuning(template="{p:3}{prompt}", encoder_hidden_size=8), "P_TUNING"),
    "ptuning-none": Entry(PTuning(template="{p:2}{prompt} so {p:1}", encoder="none"), served=True),
    "ptuning-anchors": Entry(
        PTuning(template="{p:3} well, {prompt} then", encoder_hidden_size=8),
        served=True,
        pairs=True,
    ),
    "ptuning-run": Entry(
        PTuning(
            template="{p:2}{prompt}{p:2} so {completion}", encoder="lstm", encoder_hidden_size=8
        ),
        run=True,
    ),
}


def select_for_causal_models() -> dict[str, Entry]:
    """The entries whose stacks causal models have."""
    return {
        name: entry
        for name, entry in CATALOGUE.items()
        if not (set(getattr(entry.method, "stacks", None) or ()) - {"decoder"})
    }


def select_served(*, pairs: bool = False) -> dict[str, Method]:
    """The methods, by name, that a batch of a causal (or an encoder-decoder) model may mix."""
    entries = (
        {name: entry for name, entry in CATALOGUE.items() if entry.pairs}
        if pairs
        else select_for_causal_models()
    )
    return {name: entry.method for name, entry in entries.items() if entry.served}
