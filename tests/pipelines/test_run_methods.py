"""Every method, and encoder-decoder backbones, from rows to an answer: partition, train, register,
promote, serve."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from method_catalogue import CATALOGUE
from runs import registry_of, settings, user_rows, users_of, write_rows
from safetensors.torch import load_file
from salted import user_key
from tiny_backbones import SEQ2SEQ, build_model
from tiny_model import make_tokenizer, save_encoder_decoder

from pipelines.config import RunConfig, load_config
from pipelines.report.progress import RunProgress
from pipelines.run import execute
from ptuning.generation import generate
from ptuning.model.load import load_backbone
from ptuning.prefix.artifact import Prefix
from ptuning.store import Store, prefix_path, resume_path
from serve.config import ServeConfig
from serve.events import Answer, Ask
from serve.service import Service

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

USERS = {"ann": 10, "bob": 12}
ALWAYS = ("gate.min_gain=-10", "registry.prefix_name=default")
METHODS = [name for name, entry in CATALOGUE.items() if entry.run]


@pytest.fixture(scope="module")
def pair_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny BART and a tiny T5."""
    folder = tmp_path_factory.mktemp("pairs")
    save_encoder_decoder(folder / "bart")
    build_model(SEQ2SEQ["t5"](), "eager").save_pretrained(folder / "t5")
    make_tokenizer().save_pretrained(folder / "t5")
    return {family: folder / family for family in ("bart", "t5")}


def settings_of(model: Path, *more: str) -> RunConfig:
    """As `config_of`, but without the number of virtual tokens, which a template determines."""
    all_of_them = settings(model, *more)
    if any(one.startswith("method.template=") for one in more):
        all_of_them.remove("method.num_virtual_tokens=4")
    return load_config(None, all_of_them, {})


def run(data: Path, store: Path, config: RunConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The run's summary and its table of users."""
    with RunProgress() as progress:
        facts = execute([str(data)], Store(store), config, progress)
    folder = store / "runs" / facts.run_id
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary, users_of(store, facts.run_id)


def ask_service(store: Path, config: RunConfig, names: dict[str, str]) -> dict[str, Answer]:
    """The service's answers to "say it", as each user and without a user, asked concurrently.

    `names`: user id to prefix name.
    """
    backbone = load_backbone(config.backbone.name, dtype="float32")
    service = Service(ServeConfig(max_rows=4), backbone, Store(store))

    async def ask() -> dict[str, Answer]:
        asks = {
            user: Ask(
                id=user or "nobody",
                prompt="say it",
                user_key=user_key(user) if user else None,
                prefix_name=name,
                max_tokens=6,
                temperature=0.0,
                top_p=1.0,
                seed=0,
                stop=(),
            )
            for user, name in {**names, "": "default"}.items()
        }
        given = await asyncio.gather(*(service.answer(one) for one in asks.values()))
        return dict(zip(asks, given, strict=True))  # type: ignore[arg-type]

    try:
        return asyncio.run(ask())
    finally:
        service.close()


def check_answers(store: Path, config: RunConfig, table: list[dict[str, Any]]) -> None:
    """Check that each user is answered with the run's prefix, applied as in the library."""
    given = ask_service(store, config, {row["user_id"]: "default" for row in table})
    backbone = load_backbone(config.backbone.name, dtype="float32")
    registry, place = registry_of(store, config), Store(store)
    for row in table:
        champion = registry.champion(row["user_key"], "default")
        assert champion is not None
        assert champion.digest == row["digest"]
        prefix = Prefix.from_bytes(
            place.read(prefix_path(row["user_key"], champion.digest)),
            backbone,
            user_key=row["user_key"],
        )
        answer = given[row["user_id"]]
        assert isinstance(answer, Answer), answer
        assert answer.prefix is not None
        assert answer.prefix.digest == row["digest"]
        assert [answer.text] == generate(backbone, ["say it"], [prefix], max_new_tokens=6)
    assert given[""].prefix is None
    assert [given[""].text] == generate(backbone, ["say it"], [None], max_new_tokens=6)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_from_rows_to_answers(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    entry = CATALOGUE[name]
    rate = f"train.learning_rate={entry.rate}"
    config = settings_of(tiny_model_dir, *ALWAYS, *entry.settings, rate)
    rows = [row for user, count in USERS.items() for row in user_rows(user, count)]
    summary, table = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "store", config)
    assert summary["users"]["promoted"] == 2
    assert summary["nll"]["candidate"] < summary["nll"]["base"]
    assert all(row["nll_other_valid"] is not None for row in table)
    check_answers(tmp_path / "store", config, table)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("t5", ["backbone.attention=eager", "train.epochs=8"]),
        (
            "bart",
            ["method.type=ptuning", "method.template={p:2}{prompt}{p:2}", "method.encoder=none"],
        ),
    ],
    ids=["t5-prefix", "bart-ptuning"],
)
def test_an_encoder_decoder_backbone_goes_from_rows_to_answers(
    family: str, more: list[str], pair_dirs: dict[str, Path], tmp_path: Path
) -> None:
    config = settings_of(pair_dirs[family], *ALWAYS, *more)
    rows = [row for user, count in USERS.items() for row in user_rows(user, count)]
    summary, table = run(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "store", config)
    assert summary["users"]["promoted"] == 2
    assert summary["nll"]["candidate"] < summary["nll"]["base"]
    check_answers(tmp_path / "store", config, table)


STEADY = [*ALWAYS, "train.schedule=constant", "train.keep_resume=true", "train.patience=null"]


@pytest.fixture(scope="module")
def first(
    ray_session: None, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, str]]:
    """A run of two epochs: its data, its store (tests use a copy), digests by user id."""
    folder = tmp_path_factory.mktemp("first")
    rows = [row for user, count in USERS.items() for row in user_rows(user, count)]
    data, store = write_rows(folder / "rows.jsonl", rows), folder / "store"
    _, table = run(data, store, settings_of(tiny_model_dir, *STEADY, "train.epochs=2"))
    return data, store, {row["user_id"]: row["digest"] for row in table}


def test_users_own_several_prefixes_by_name(
    first: tuple[Path, Path, dict[str, str]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    _, first_store, digests_of_first = first
    store = shutil.copytree(first_store, tmp_path / "store")
    more = ("method.type=prompt", "registry.prefix_name=tone")
    config = settings_of(tiny_model_dir, *ALWAYS, *more)
    rows = [row for user, count in USERS.items() for row in user_rows(user, count, 1)]
    _, table = run(write_rows(tmp_path / "tone.jsonl", rows), store, config)
    tables = {
        "default": digests_of_first,
        "tone": {row["user_id"]: row["digest"] for row in table},
    }
    for name, digests in tables.items():
        given = ask_service(store, config, dict.fromkeys(USERS, name))
        for user, digest in digests.items():
            prefix = given[user].prefix
            assert prefix is not None
            assert (prefix.name, prefix.digest) == (name, digest)
    assert not set(tables["default"].values()) & set(tables["tone"].values())


def test_trainings_start_from_the_champion_and_go_on_where_they_stopped(
    first: tuple[Path, Path, dict[str, str]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data, first_store, digests_of_first = first
    shutil.copytree(first_store, tmp_path / "one")

    def digests(store: str, *more: str) -> dict[str, str]:
        _, table = run(data, tmp_path / store, settings_of(tiny_model_dir, *STEADY, *more))
        return {row["user_key"]: row["digest"] for row in table}

    for user, digest in digests_of_first.items():
        assert (tmp_path / "one" / resume_path(user_key(user), digest)).is_file()
    further = digests("one", "train.epochs=4", "train.start=resume")
    at_once = digests("two", "train.epochs=4")

    def kv(store: str, key: str, digest: str) -> Any:
        path = Store(tmp_path / store).path("prefixes", key[:2], key, f"{digest}.safetensors")
        return load_file(path)["decoder.0.keys"]

    for key in at_once:
        assert (kv("one", key, further[key]) - kv("two", key, at_once[key])).abs().max() < 1e-5
    warm = digests("one", "train.epochs=1", "train.start=champion", "train.learning_rate=1e-9")
    for key in at_once:
        assert (kv("one", key, warm[key]) - kv("one", key, further[key])).abs().max() < 1e-6
