"""What the service can be told. The fields' descriptions are the reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ptuning.types import Config


class ServeConfig(Config):
    SECTION: ClassVar[str] = "serve"

    host: str = Field(
        "127.0.0.1",
        description="address to listen on; beyond loopback only with serve.api_keys_file",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 takes any free one")
    model_name: str | None = Field(
        None, description="name in /v1/models and in requests; none: the backbone's own name"
    )
    api_keys_file: str | None = Field(
        None,
        description='JSON file {"key": ["user", …] or "*", …}: who may ask as which users; '
        "none: every caller on this machine is trusted",
    )
    cors_origins: tuple[str, ...] = Field(
        (),
        description="web origins whose pages may call the service from a browser, such as "
        '["http://localhost:3000"]; ["*"]: all, only with serve.api_keys_file',
    )
    unknown_user: Literal["base", "404"] = Field(
        "base",
        description="what answers a user without a champion: the base model, or an error 404",
    )
    max_rows: int = Field(
        16,
        ge=1,
        description="rows that are decoded together per replica: one for each request, or one for "
        "each member of an ensemble",
    )
    max_queue: int = Field(
        64, ge=0, description="requests that may wait per replica; one more is answered 429"
    )
    prefill_tokens: int = Field(
        1024, ge=1, description="prompt tokens that newcomers may add to one step, with padding"
    )
    max_length: int = Field(1024, ge=1, description="most prompt tokens of a request")
    max_tokens_default: int = Field(64, ge=1, description="max_tokens where a request has none")
    max_tokens_limit: int = Field(1024, ge=1, description="largest max_tokens of a request")
    temperature_default: float = Field(
        1.0, ge=0, le=2, description="temperature where a request has none (OpenAI's default)"
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="largest request body in bytes")
    body_timeout_s: float = Field(
        30.0, gt=0, description="longest wait for a whole request body, in seconds; then 408"
    )
    max_messages: int = Field(
        512, ge=1, description="most messages of a chat request, and most parts of their contents"
    )
    encoders: int = Field(
        4,
        ge=1,
        description="prompts that are encoded at the same time per replica; each holds a copy of "
        "the tokenizer",
    )
    refresh_seconds: float = Field(
        2.0, gt=0, description="how often a replica looks for newly published champions"
    )
    prefix_cache_mb: int = Field(256, ge=0, description="prefixes kept in memory per replica, MB")
    replicas: int = Field(1, ge=1, description="engine replicas; each holds the whole backbone")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves per engine replica")
    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs that Ray reserves per engine replica; none: one where Ray has a GPU and "
        "backbone.device is not cpu",
    )
    num_threads: int = Field(
        0, ge=0, description="torch threads per engine replica; 0: the machine's cores, shared"
    )
    log_file: str | None = Field(
        None,
        description="file that the service's own log lines are appended to; none: they are only "
        "printed by `ptuning serve`",
    )
    request_timeout_s: float = Field(
        300.0, gt=0, description="longest time of one request, queue included; then 504"
    )
    start_timeout_s: float = Field(300.0, gt=0, description="longest wait for a healthy service")
