"""The service's settings. The fields' descriptions are the reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ptuning.types import Config


class ServeConfig(Config):
    SECTION: ClassVar[str] = "serve"

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; other than loopback only with serve.api_keys_file",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0: any free port")
    model_name: str | None = Field(
        None, description="name in /v1/models and in requests; none: the backbone's name"
    )
    api_keys_file: str | None = Field(
        None,
        description='JSON file {"key": ["user", …] or "*", …}: the users that the holder of each '
        "key may name; none: every caller on this machine is trusted",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="web origins whose pages may call the service from a browser, such as "
        '["http://localhost:3000"]; ["*"]: all, only with serve.api_keys_file',
    )
    unknown_user: Literal["base", "404"] = Field(
        "base",
        description="for a user without a champion: base: the base model answers; 404: an error",
    )
    max_rows: int = Field(
        16,
        ge=1,
        description="rows that a replica decodes together: one per request, or one per member of "
        "an ensemble",
    )
    max_queue: int = Field(
        64, ge=0, description="requests that may wait per replica; further ones are answered 429"
    )
    prefill_tokens: int = Field(
        1024, ge=1, description="prompt tokens that new requests may add to a step, with padding"
    )
    max_length: int = Field(1024, ge=1, description="maximum prompt tokens of a request")
    max_tokens_default: int = Field(
        64, ge=1, description="max_tokens of requests that do not set it"
    )
    max_tokens_limit: int = Field(1024, ge=1, description="largest max_tokens of a request")
    temperature_default: float = Field(
        1.0,
        ge=0,
        le=2,
        description="temperature of requests that do not set it (OpenAI's default)",
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="largest request body, in bytes")
    body_timeout_s: float = Field(
        30.0, gt=0, description="maximum wait for a request's body, in seconds; then 408"
    )
    max_messages: int = Field(
        512, ge=1, description="maximum messages of a chat request, and parts of their contents"
    )
    encoders: int = Field(
        4,
        ge=1,
        description="prompts that a replica encodes at the same time; each needs a copy of the "
        "tokenizer",
    )
    refresh_seconds: float = Field(
        2.0, gt=0, description="seconds between a replica's polls for newly published champions"
    )
    prefix_cache_mb: int = Field(
        256, ge=0, description="memory for cached prefixes per replica, in MB"
    )
    replicas: int = Field(1, ge=1, description="engine replicas; each loads the full backbone")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves per engine replica")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves per engine replica; none: one if Ray has a GPU and "
        "backbone.device is not cpu",
    )
    num_threads: int = Field(
        0, ge=0, description="torch threads per engine replica; 0: an equal share of the cores"
    )
    log_file: str | None = Field(
        None,
        description="file to which the service appends its log lines; none: `ptuning serve` only "
        "prints them",
    )
    request_timeout_s: float = Field(
        300.0, gt=0, description="maximum time of a request, queue included; then 504"
    )
    start_timeout_s: float = Field(300.0, gt=0, description="maximum wait for a healthy service")
