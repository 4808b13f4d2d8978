"""Every tuning method as tests use it: one list, from which they are parametrised.

A new method gets entries here. `test_every_method.py` fails where a registered one has none, or
none of a kind that all methods are held to.
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

    `fast`: trained in the fast tier (packed = plain); all others in the whole. `served`: answers in
    mixed batches, of generation and of the service: one entry for each different way of answering.
    `pairs`: answers on encoder-decoder models too; needs `served`. `run`: goes through a whole run,
    from rows to an answer. `peft`: PEFT's name of the kind; None: PEFT has no place for it.
    `rate` is a learning rate at which so small a model learns within a few epochs, and `gain` what
    it must then learn of one token that a user always says, in nats per token.
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
        assert self.served or not self.pairs, "`pairs` is read together with `served`"

    @property
    def settings(self) -> list[str]:
        """As `--set` of a run."""
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


def of_causal_models() -> dict[str, Entry]:
    """Those without a stack that causal models lack."""
    return {
        name: entry
        for name, entry in CATALOGUE.items()
        if not (set(getattr(entry.method, "stacks", None) or ()) - {"decoder"})
    }


def served(*, pairs: bool = False) -> dict[str, Method]:
    """What a batch of a causal (or an encoder-decoder) model's users may hold, by name."""
    entries = (
        {name: entry for name, entry in CATALOGUE.items() if entry.pairs}
        if pairs
        else of_causal_models()
    )
    return {name: entry.method for name, entry in entries.items() if entry.served}
