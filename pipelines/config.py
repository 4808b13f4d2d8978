"""A run's configuration, composed of the components' sections, from a file, the environment and
--set.

Later sources win: defaults, `--config FILE.yaml`, `PTUNING_TRAIN__EPOCHS=3`, `--set
train.epochs=3`. Unknown keys are errors that name the nearest known key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

from pipelines.service import ServeConfig
from ptuning.data.examples import DataConfig
from ptuning.errors import ConfigError
from ptuning.gate import GateConfig
from ptuning.methods import DEFAULT
from ptuning.methods.base import Tuning
from ptuning.methods.catalogue import METHODS, AnyMethod, default_method
from ptuning.model.facts import BackboneConfig
from ptuning.prefix.artifact import ArtifactConfig
from ptuning.registry.base import RegistryConfig
from ptuning.system.environment import VARIABLES
from ptuning.system.redaction import hide_passwords
from ptuning.train.config import TrainConfig
from ptuning.types import Config

_ENVIRONMENT = "PTUNING_"


class RayConfig(Config):
    """How a run uses a Ray cluster."""

    SECTION: ClassVar[str] = "ray"

    address: str | None = Field(
        None,
        description="address of a running Ray cluster; none: that in RAY_ADDRESS, which `ray job "
        "submit` sets, or else start one for this run",
    )
    runtime_env: dict[str, Any] | None = Field(
        None, description="Ray's runtime environment for the run's workers, as a JSON object"
    )
    connect_s: float = Field(
        60.0,
        gt=0,
        description="how long a run waits for a cluster that does not answer, in seconds",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="training processes of the gang; none: one per GPU or, without GPUs, one per "
        "CPU core as far as memory allows",
    )
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs (compute threads) per worker; none: an equal share of the node's",
    )
    gpus_per_worker: float | None = Field(
        None, ge=0, description="GPUs per worker; none: one if the cluster has any"
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="how many gangs in a row may fail without progress; one more fails the run",
    )
    timeout_s: float = Field(
        120.0, gt=0, description="seconds after which a sharded gang gives up on a silent peer"
    )


class RunConfig(Config):
    """All settings of `ptuning run`."""

    data: DataConfig = DataConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: AnyMethod = Field(default_factory=default_method)
    train: TrainConfig = TrainConfig()
    gate: GateConfig = GateConfig()
    registry: RegistryConfig = RegistryConfig()
    artifact: ArtifactConfig = ArtifactConfig()
    serve: ServeConfig = ServeConfig()
    ray: RayConfig = RayConfig()

    def digest(self) -> str:
        """SHA-256 of the settings that a run's result depends on.

        It excludes `serve`, `ray` and how the registry is reached, so that a run can be resumed
        after a password has changed or a server has moved.
        """
        left_out: dict[str, Any] = {"serve": True, "ray": True, "registry": {"uri", "patience_s"}}
        values = self.model_dump(mode="json", exclude=left_out)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The configuration as YAML; a password in the registry's address is hidden."""
        values = self.model_dump(mode="json")
        if uri := self.registry.uri:
            values["registry"]["uri"] = hide_passwords(uri)
        return yaml.safe_dump(values, sort_keys=False)


def load_config(
    file: str | None = None,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> RunConfig:
    """Compose a configuration. Raises ConfigError for anything unknown or out of range.

    Paths are made absolute here, because workers and replicas have other working directories.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        _merge(tree, _read_yaml(file))
    for name, value in sorted((os.environ if environment is None else environment).items()):
        if name.startswith(_ENVIRONMENT) and name not in VARIABLES:
            path = name.removeprefix(_ENVIRONMENT).lower().split("__")
            if len(path) == 1:
                raise ConfigError(
                    "an environment variable that sets nothing",
                    seen=name,
                    expected=f"{_ENVIRONMENT}SECTION__KEY, with two underscores",
                    fix="correct the name, or unset it",
                )
            _put(tree, path, _parse(path, value), name)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(
                "a setting without a value",
                seen=f"--set {setting}",
                expected="--set section.key=value",
            )
        path = key.strip().split(".")
        _put(tree, path, _parse(path, value), f"--set {setting}")
    if isinstance(tree.get("method"), Mapping):
        tree["method"] = {"type": DEFAULT, **tree["method"]}
    _check_keys(RunConfig, tree, "")
    _read_none(tree)
    return _with_absolute_paths(RunConfig.model_validate(tree))


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with all local paths made absolute."""
    backbone = config.backbone.model_copy(update={"name": _absolute_model(config.backbone.name)})
    registry, serve = config.registry, config.serve
    if registry.uri is not None:
        registry = registry.model_copy(update={"uri": _absolute_uri(registry.uri)})
    if serve.api_keys_file is not None:
        path = os.path.abspath(os.path.expanduser(serve.api_keys_file))
        serve = serve.model_copy(update={"api_keys_file": path})
    return config.model_copy(update={"backbone": backbone, "registry": registry, "serve": serve})


def _absolute_model(name: str) -> str:
    """Make a directory or file absolute; an alias or hub id is returned unchanged."""
    path = Path(name).expanduser()
    if name.startswith((".", "~")) or path.suffix == ".gguf":
        return os.path.abspath(path)
    if not path.exists() or ("/" not in name and _is_alias(name)):
        return name
    return os.path.abspath(path)


def _is_alias(name: str) -> bool:
    from ptuning.model.locate import MODEL_ALIASES  # imports Transformers

    return name in MODEL_ALIASES


def _absolute_uri(uri: str) -> str:
    """Make the path of `sqlite:///relative.db` absolute; other URIs are returned unchanged."""
    scheme, slashes, path = uri.partition(":///")
    if not scheme.startswith("sqlite") or not slashes or path.startswith(("/", ":")) or not path:
        return uri
    return f"{scheme}:///{os.path.abspath(path)}"


# Settings that answers depend on; all others concern training.
_SERVING_SECTIONS = ("backbone.", "registry.", "serve.")
_SERVING_KEYS = {"data.template", "data.max_length"}


def command_options(config: RunConfig) -> list[str]:
    """Command-line arguments for serving the results of a run with this configuration: all settings
    that affect answers and are not at their defaults, without passwords."""
    options = []
    for key, field in known_keys():
        if not key.startswith(_SERVING_SECTIONS) and key not in _SERVING_KEYS:
            continue
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name)
        if value == field.get_default(call_default_factory=True):
            continue
        if key == "backbone.name":
            options += ["--model", str(value)]
        else:
            text = json.dumps(value) if isinstance(value, (bool, list, dict)) else str(value)
            options += ["--set", f"{key}={hide_passwords(text)}"]
    return options


def _parse(path: Sequence[str], text: str) -> Any:
    """Parse a setting's value: as YAML, but literally for a text setting (a template may contain
    `#` and `:`)."""
    types = [field.annotation for key, field in known_keys() if key == ".".join(path)]
    if types and all(annotation in (str, str | None) for annotation in types):
        return None if types[0] is not str and text in ("null", "none", "~", "") else text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _read_none(tree: Mapping[str, Any]) -> None:
    """Replace the word `none`, which the help texts use, by None for optional settings."""
    options: dict[str, set[Any]] = {}
    for key, field in known_keys():
        options.setdefault(key, set()).update(get_args(field.annotation))
    for section, settings in tree.items():
        for name, value in settings.items():
            allowed = options.get(f"{section}.{name}", set())
            if value == "none" and NoneType in allowed and "none" not in allowed:
                settings[name] = None


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("the configuration file cannot be read", seen=str(error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration file is not YAML", seen=f"{file}: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            "the configuration file has no sections", seen=type(tree).__name__, expected="a mapping"
        )
    return tree


def _merge(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _put(tree: dict[str, Any], path: Sequence[str], value: Any, origin: str) -> None:
    *sections, key = path
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError("a setting is below a value that has no keys", seen=origin)
    node[key] = value


def known_keys(
    model: type[BaseModel] = RunConfig, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every `section.key` with its pydantic field: the source of help and reference pages.

    Keys of `method` are those of all methods in turn; a key of several methods is listed once per
    distinct description.
    """
    for name, field in model.model_fields.items():
        described: dict[str, set[str]] = {}
        for section in _sections(field):
            for key, nested in known_keys(section, f"{prefix}{name}."):
                if str(nested.description) not in described.setdefault(key, set()):
                    described[key].add(str(nested.description))
                    yield key, nested
        if not _sections(field):
            yield f"{prefix}{name}", field


def _sections(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The models that a field can have as its value; () for a plain value."""
    if field.annotation is Tuning:
        return tuple(METHODS.values())
    model = field.annotation
    return (model,) if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _check_keys(model: type[BaseModel], tree: Mapping[str, Any], prefix: str) -> None:
    for key, value in tree.items():
        field = model.model_fields.get(str(key))
        if field is None:
            raise _no_such_key(model, f"{prefix}{key}")
        sections = _sections(field)
        if sections:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{prefix}{key} is a section", seen=repr(value), expected="keys below it"
                )
            section = METHODS.get(str(value.get("type"))) if len(sections) > 1 else sections[0]
            if section is None:
                raise ConfigError(
                    "no such tuning method",
                    seen=f"{prefix}{key}.type={value.get('type')}",
                    expected=", ".join(METHODS),
                )
            _check_keys(section, value, f"{prefix}{key}.")


def _no_such_key(model: type[BaseModel], key: str) -> ConfigError:
    allowed = {f"method.{name}" for name in model.model_fields}
    others = [
        name
        for name, method in METHODS.items()
        if key.removeprefix("method.") in method.model_fields
    ]
    if key.startswith("method.") and others:
        return ConfigError(
            "this tuning method has no such setting",
            seen=key,
            expected=", ".join(sorted(allowed)),
            fix=f"it belongs to method.type {' or '.join(others)}",
        )
    known = [name for name, _ in known_keys()] + list(RunConfig.model_fields)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    return ConfigError(
        "no such configuration key",
        seen=key,
        expected=f"did you mean {near[0]}?" if near else "a key of `ptuning run --help`",
    )
