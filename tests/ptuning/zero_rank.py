"""One rank of a sharded gang. It trains its users with every method on each model and writes the
results."""

from __future__ import annotations

import faulthandler
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_backbones import random_prefix, user_rows

from ptuning.methods.base import Method
from ptuning.methods.prefix import PrefixTuning
from ptuning.methods.prompt import PromptTuning
from ptuning.methods.ptuning import PTuning
from ptuning.model.backbone import Backbone
from ptuning.prefix.artifact import pack_prefix
from ptuning.scoring import score_split
from ptuning.train.config import TrainConfig, UserRows
from ptuning.train.step import Machine

P = 4
CONFIG = TrainConfig(epochs=2, patience=None)
METHODS: dict[str, Method] = {
    "prefix": PrefixTuning(num_virtual_tokens=P),
    "top layer, infix": PrefixTuning(num_virtual_tokens=P, layers=1, placement="infix"),
    "mlp, dropout": PrefixTuning(num_virtual_tokens=P, encoder_hidden_size=8, dropout=0.2),
    "prompt, two": PromptTuning(num_virtual_tokens=P, ensemble=2, init="random"),
    "ptuning": PTuning(template="{p:2}{prompt}{p:2}", encoder="lstm", encoder_hidden_size=8),
}


def share(rank: int) -> list[UserRows]:
    """Unequal work."""
    users = [
        [user_rows("ann", 30, 6, init_ids=P), user_rows("cy", 9, 3, init_ids=P)],
        [user_rows("bob", 8, 2, init_ids=P)],
    ]
    return users[rank]


# The method that is trained, and that of the champion another rank scores meanwhile.
CHAMPIONS: dict[str, tuple[Method, Method]] = {
    "shallower": (METHODS["prefix"], METHODS["top layer, infix"]),
    "deeper": (METHODS["top layer, infix"], METHODS["prefix"]),
    "prompt": (METHODS["prefix"], PromptTuning(num_virtual_tokens=P)),
    "keys and values": (PromptTuning(num_virtual_tokens=P), METHODS["prefix"]),
}


# For encoder-decoder models: three stacks, and positions that the rank passes to the decoder.
PAIR_METHODS: dict[str, Method] = {
    "prefix": PrefixTuning(num_virtual_tokens=P),
    "top layer": PrefixTuning(num_virtual_tokens=P, layers=1, stacks=("decoder", "cross")),
    "ptuning": METHODS["ptuning"],
}
PAIR_CHAMPIONS: dict[str, tuple[Method, Method]] = {
    "of the encoder": (
        PAIR_METHODS["top layer"],
        PrefixTuning(num_virtual_tokens=P, stacks=("encoder",)),
    ),
    "prompt": CHAMPIONS["prompt"],
}
KINDS = {"causal": (METHODS, CHAMPIONS), "pair": (PAIR_METHODS, PAIR_CHAMPIONS)}


def champion_nats(backbone: Backbone, method: Method) -> Machine[list[float]]:
    """The nats of each row under a champion, scored several times."""
    prefix = random_prefix(backbone, method, seed=1)
    arrangement = prefix.arrangement(backbone.template)
    rows = [arrangement.row(row) for row in share(0)[0].train]
    nats: list[float] = []
    for _ in range(3):
        pack = pack_prefix([prefix], backbone)
        (losses,) = yield from score_split(backbone, [rows], pack, 40)
        nats = list(losses.nats)
    return nats


def main() -> None:
    """Command-line arguments: the output path, then the kind and the directory of each model."""
    target, *models = sys.argv[1:]
    faulthandler.dump_traceback_later(280, exit=True)  # before the test gives up
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind, directory in zip(models[::2], models[1::2], strict=True):
        name = os.path.basename(directory)
        save_file(train_and_score(kind, directory), f"{target}.{name}.{os.environ['RANK']}")


def train_and_score(kind: str, directory: str) -> dict[str, torch.Tensor]:
    from ptuning.model.facts import BackboneConfig
    from ptuning.train.packed import train_pack
    from ptuning.train.zero import LockstepDriver, load_sharded

    methods, champions = KINDS[kind]
    backbone = load_sharded(BackboneConfig(name=directory, dtype="float32"))
    trained: dict[str, torch.Tensor] = {}
    for name, method in methods.items():
        users = share(dist.get_rank())
        for one in LockstepDriver(backbone, method).run(
            train_pack(backbone, method, CONFIG, users)
        ):
            assert one.members is not None, one.error
            for member, tensors in enumerate(one.members):
                trained |= {
                    f"{name}/{one.user_key}/{member}/{key}": values.contiguous()
                    for key, values in tensors.items()
                }
    for name, (method, champion) in champions.items():
        machine: Any = (
            train_pack(backbone, method, CONFIG, share(0))
            if dist.get_rank() == 0
            else champion_nats(backbone, champion)
        )
        result = LockstepDriver(backbone, method).run(machine)
        if dist.get_rank() == 1:
            trained[f"champion/{name}"] = torch.tensor(result, dtype=torch.float64)
    return trained


if __name__ == "__main__":
    main()
