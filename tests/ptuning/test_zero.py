"""Two ranks that share a backbone by DeepSpeed ZeRO-3 train the same as one whole backbone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_backbones import SEQ2SEQ, build_model
from tiny_model import make_tokenizer
from torch import Tensor
from zero_rank import CONFIG, KINDS, champion_nats, share

from ptuning.model.backbone import Backbone
from ptuning.model.load import load_backbone
from ptuning.train.packed import train_pack
from ptuning.train.step import LocalDriver

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_method_trains_on_a_sharded_backbone_as_on_a_whole_one(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The ranks have unequal work. A rank without work still computes forward and backward."""
    models = {"causal": [tiny_model_dir], "pair": [tmp_path / "bart", tmp_path / "t5"]}
    for directory in models["pair"]:
        build_model(SEQ2SEQ[directory.name](), "eager").save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
    run_gang([str(tmp_path / "out"), *(
        str(one) for kind, own in models.items() for directory in own for one in (kind, directory)
    )])  # fmt: skip
    for kind, directories in models.items():
        for directory in directories:
            backbone = load_backbone(str(directory), dtype="float32")
            for rank in (0, 1):
                sharded = load_file(tmp_path / f"out.{directory.name}.{rank}")
                compare(backbone, kind, rank, sharded)


def run_gang(arguments: list[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join(str(path) for path in (HERE.parent.parent, HERE.parent, HERE))
    ranks = []
    for rank in (0, 1):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(HERE / "zero_rank.py"), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        told = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for process, text in zip(ranks, told, strict=True):
        assert process.returncode == 0, text[-3000:]


def compare(backbone: Backbone, kind: str, rank: int, sharded: dict[str, Tensor]) -> None:
    """Compare what a rank trained and scored with a whole backbone, and remove it from
    `sharded`."""
    methods, champions = KINDS[kind]
    for name, method in methods.items():
        machine = train_pack(backbone, method, CONFIG, share(rank))
        for one in LocalDriver(backbone).run(machine):
            assert one.members is not None
            for member, tensors in enumerate(one.members):
                for key, values in tensors.items():
                    seen = sharded.pop(f"{name}/{one.user_key}/{member}/{key}")
                    torch.testing.assert_close(seen, values, atol=1e-5, rtol=0)
    if rank == 1:
        for name, (_, champion) in champions.items():
            wanted = LocalDriver(backbone).run(champion_nats(backbone, champion))
            assert sharded.pop(f"champion/{name}").tolist() == pytest.approx(wanted, abs=1e-4), name
    assert not sharded
