"""One configuration from a file, the environment and --set. Errors name unknown keys."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest

from pipelines.config import RunConfig, command_options, known_keys, load_config
from ptuning.errors import ConfigError


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("train: {epochs: 5, batch_size: 4, seed: 7}\ndata: {max_rows: 40}\n")
    config = load_config(
        str(file),
        ["train.epochs=9"],
        {"PTUNING_TRAIN__EPOCHS": "6", "PTUNING_TRAIN__BATCH_SIZE": "2"},
    )
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (9, 2, 7)
    assert config.data.max_rows == 40


@pytest.mark.parametrize(
    ("setting", "near"),
    [
        ("train.epoch=3", "train.epochs"),
        ("data.maxrows=3", "data.max_rows"),
        ("trian.epochs=3", "train"),
        ("method.num_tokens=3", "method.num_virtual_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(setting: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        load_config(None, [setting], {})


def test_an_unknown_key_of_the_environment_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs"):
        load_config(None, [], {"PTUNING_TRAIN__EPOCS": "1"})


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=0",
        "train.epochs=many",
        "method.num_virtual_tokens=1001",
        "method.num_virtual_tokens=0",
        "method.type=lora",
        "backbone.dtype=int3",
        "data.max_bad_fraction=2",
        "train",
        "train=3",
        "train.epochs.x=3",
    ],
)
def test_a_value_that_cannot_be_used_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, [setting], {})


def test_an_unreadable_or_malformed_file_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("train: [epochs: 3")
    for file in (str(bad), str(tmp_path / "missing.yaml")):
        with pytest.raises(ConfigError):
            load_config(file, [], {})


def test_none_can_be_set() -> None:
    assert load_config(None, ["train.patience=null"], {}).train.patience is None


def test_none_is_accepted_wherever_help_says_so(tmp_path: Path) -> None:
    """In a file too. Where "none" is one of the setting's values (P-Tuning's encoder), it stays."""
    keys = {
        key: field.annotation
        for key, field in known_keys()
        if "none" in str(field.description) and NoneType in get_args(field.annotation)
    }
    assert {"train.learning_rate", "train.max_grad_norm", "method.stacks"} <= keys.keys()
    for key in keys:
        config: Any = load_config(None, [f"{key}=none"], {})
        for name in key.split("."):
            config = getattr(config, name)
        assert config is None, key
    file = tmp_path / "run.yaml"
    file.write_text("train: {max_grad_norm: none}\nmethod: {type: ptuning, encoder: none}")
    both = load_config(str(file), [], {})
    assert both.train.max_grad_norm is None
    assert both.method.model_dump()["encoder"] == "none"


OTHER_VALUES = {
    "data": "data.max_rows=40",
    "backbone": "backbone.dtype=bfloat16",
    "method": "method.num_virtual_tokens=3",
    "train": "train.epochs=4",
    "gate": "gate.min_gain=0.5",
    "registry": "registry.prefix_name=tone",
    "artifact": "artifact.dtype=bfloat16",
    "serve": "serve.port=9000",
    "ray": "ray.workers=4",
}


def test_a_run_is_identified_by_every_section_that_its_result_depends_on() -> None:
    assert set(OTHER_VALUES) == set(RunConfig.model_fields), "add the new section to this test"
    plain = load_config(None, [], {}).digest()
    differ = {
        section
        for section, setting in OTHER_VALUES.items()
        if load_config(None, [setting], {}).digest() != plain
    }
    assert differ == set(RunConfig.model_fields) - {"serve", "ray"}


def test_a_rotated_password_and_a_moved_registry_keep_a_run_resumable() -> None:
    digests = {
        load_config(None, [f"registry.uri={uri}"], {}).digest()
        for uri in ("postgresql://me:old@a/mlflow", "postgresql://me:new@b/mlflow")
    }
    assert digests == {load_config(None, [], {}).digest()}


def test_paths_are_absolute_wherever_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers and replicas have different working directories."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    for name in ("./model", "model", f"../{tmp_path.name}/model", str(tmp_path / "model")):
        config = load_config(None, [f"backbone.name={name}"], {})
        assert config.backbone.name == str(tmp_path / "model")
    file = tmp_path / "run.yaml"
    file.write_text("backbone: {name: model.gguf}\nserve: {api_keys_file: keys.json}")
    config = load_config(str(file), ["registry.uri=sqlite:///my.db"], {})
    assert config.backbone.name == str(tmp_path / "model.gguf")
    assert config.serve.api_keys_file == str(tmp_path / "keys.json")
    assert config.registry.uri == f"sqlite:///{tmp_path}/my.db"


def test_names_that_are_no_paths_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    for name in ("smollm2", "gemma3-270m", "owner/model"):
        assert load_config(None, [f"backbone.name={name}"], {}).backbone.name == name
    for uri in ("http://127.0.0.1:5000", "postgresql://u@h/db", "sqlite:////abs/x.db"):
        assert load_config(None, [f"registry.uri={uri}"], {}).registry.uri == uri


def test_the_next_command_repeats_what_an_answer_depends_on_and_no_more() -> None:
    assert command_options(load_config(None, [], {})) == []
    sets = [
        "backbone.name=owner/model",
        "backbone.dtype=float32",
        "data.template=plain",
        "data.max_rows=7",
        "train.epochs=9",
        "ray.workers=2",
        "registry.uri=postgresql://me:hunter2@db/mlflow",
        "registry.prefix_name=tone",
    ]
    options = command_options(load_config(None, sets, {}))
    assert sorted(option for option in options if option != "--set") == [
        "--model",
        "backbone.dtype=float32",
        "data.template=plain",
        "owner/model",
        "registry.prefix_name=tone",
        "registry.uri=postgresql://me:***@db/mlflow",
    ]


def test_the_resolved_configuration_can_be_loaded_again(tmp_path: Path) -> None:
    config = load_config(None, ["train.epochs=4", "data.max_users=16"], {})
    file = tmp_path / "again.yaml"
    file.write_text(config.to_yaml())
    assert load_config(str(file), [], {}) == config


def test_every_key_is_described() -> None:
    undescribed = [key for key, field in known_keys() if not field.description]
    assert undescribed == []


def test_text_is_taken_as_it_is_and_not_as_yaml() -> None:
    template = "Review #1: {p:3}{prompt} Answer: {p:2}"
    sets = ["method.type=ptuning", f"method.template={template}", "method.init_text=yes"]
    method = load_config(None, sets, {}).method
    assert method.layout is not None
    assert (method.layout.text, method.init_text) == (template, "yes")
    environment = {"PTUNING_METHOD__INIT_TEXT": "issue #12"}
    assert load_config(None, [], environment).method.init_text == "issue #12"
    assert load_config(None, ["method.init_text=null"], {}).method.init_text is None


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (["method.type=adapter"], "prefix, prompt, ptuning"),
        (["method.ensemble=3"], "it belongs to method.type prompt"),
        (["method.type=ptuning", "method.template={p:3}"], "{prompt} 0 times"),
        (["method.layers=0"], "method.layers"),
        (["method.num_virtual_tokens=0"], "method.num_virtual_tokens"),
        (["method.type=ptuning", "method.template={prompt}{p:1001}"], "at most 1000"),
    ],
)
def test_method_errors_are_configuration_errors_that_name_the_key(
    sets: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, sets, {})
    assert told in str(caught.value)


def test_an_environment_variable_with_one_underscore_too_few_is_an_error() -> None:
    with pytest.raises(ConfigError, match="two underscores"):
        load_config(None, [], {"PTUNING_TRAIN_EPOCHS": "9"})
    load_config(None, [], {"PTUNING_CACHE": "/somewhere", "PATH": "/bin"})
