"""The service as a whole: build the Ray Serve application, start it, wait, shut it down."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from serve import local_ray  # first: it sets what ray reads when it is imported

# isort: split
import ray
import ray.exceptions
import ray.serve
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from ptuning.data.encode import TemplateKind
from ptuning.errors import ServeError
from ptuning.model.facts import BackboneConfig
from ptuning.model.locate import locate
from ptuning.registry import RegistryConfig, registry_uri
from ptuning.store import Store
from ptuning.system.ports import free_port
from serve.config import ServeConfig
from serve.http.auth import Keys, check_exposure
from serve.replica import EngineReplica, HttpReplica

log = logging.getLogger("ptuning.serve")

APP = "ptuning"
_SLACK = 32  # requests beyond rows and queue: those that are refused, health checks


def served_name(config: ServeConfig, backbone: BackboneConfig) -> str:
    """The name in /v1/models: configured, else the model's own, without directories."""
    if config.model_name:
        return config.model_name
    name = locate(backbone.name).name
    return Path(name).name if name.startswith("/") else name


def build(
    config: ServeConfig,
    *,
    store: str,
    backbone: BackboneConfig,
    template: TemplateKind,
    registry: RegistryConfig,
) -> ray.serve.Application:
    """The application, not yet running. Raises ConfigError and ModelNotFound."""
    check_exposure(config)
    if config.api_keys_file is not None:
        Keys.read(config.api_keys_file)  # a bad file is an error here, not in a replica
        config = config.model_copy(
            update={"api_keys_file": str(Path(config.api_keys_file).resolve())}
        )
    capacity = config.max_rows + config.max_queue + _SLACK
    embedded = registry_uri(registry, Store(store))
    engine = ray.serve.deployment(
        name="Engine",
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": config.num_gpus,
            "runtime_env": {"env_vars": _engine_environment()},
        },
        max_ongoing_requests=capacity,
        max_queued_requests=_SLACK,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=1,
    )(EngineReplica).bind(config, backbone, template, registry, embedded)
    http = ray.serve.deployment(
        name="Http",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=capacity * config.replicas + _SLACK,
        max_queued_requests=_SLACK,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=1,
    )(ray.serve.ingress()(HttpReplica))
    return http.bind(config, served_name(config, backbone), engine)


def _engine_environment() -> dict[str, str]:
    """What must stand in an engine's environment before torch is imported there.

    OpenMP's threads spin while they wait, which is ruinous where somebody else wants the
    cores (2 cores, load 6: 4 answers took 260 s, with passive waiting 6 s).
    """
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


class Running:
    """A service that is up; `close` (or leaving its `with` block) takes it down."""

    def __init__(self, config: ServeConfig, *, owns_ray: bool) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"http://{host}:{config.port}"
        self._owns_ray = owns_ray

    def close(self) -> None:
        """Stop the service, and Ray too where `run` started it. May be called twice."""
        if not ray.is_initialized():
            return
        try:
            applications = ray.serve.status().applications
            if APP in applications:
                ray.serve.delete(APP)  # lets requests in flight end
            # Where Ray goes too, everything goes with it.
            if not self._owns_ray and set(applications) <= {APP}:
                ray.serve.shutdown()
        except Exception:
            log.exception("the service did not stop cleanly")
        finally:
            if self._owns_ray:
                ray.shutdown()

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run(
    config: ServeConfig,
    *,
    store: str,
    backbone: BackboneConfig,
    template: TemplateKind = "auto",
    registry: RegistryConfig | None = None,
    blocking: bool = True,
) -> Running:
    """Start the service on this machine and wait until it is healthy.

    Uses the Ray that this process has, else starts a small one. `blocking` prints the address
    and returns after SIGINT or SIGTERM, with everything stopped. Raises ConfigError,
    ModelNotFound, or ServeError where the port is taken or the service does not come up.
    """
    check_exposure(config)
    config = config.model_copy(update={"port": _free_port(config)})
    application = build(
        config,
        store=store,
        backbone=backbone,
        template=template,
        registry=registry or RegistryConfig(),
    )
    owns_ray = local_ray.start_ray(max(1.0, config.replicas * config.num_cpus))
    running = Running(config, owns_ray=owns_ray)
    # After Ray, which sets handlers of its own.
    with _stop_signals(enabled=blocking) as stopped:
        try:
            _deploy(config, application)
            _wait_healthy(config, running.address, stopped)
            if blocking and not stopped.is_set():
                print(_greeting(running.address, served_name(config, backbone)), flush=True)
                stopped.wait()
        except BaseException:
            running.close()
            raise
        if blocking:
            running.close()
    return running


def _free_port(config: ServeConfig) -> int:
    """The configured port if it is free, any free one for 0. Raises ServeError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        if not config.port:
            return free_port(config.host)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((config.host, config.port))
            return config.port
    except OSError as error:
        raise ServeError(
            "the service cannot listen there",
            seen=f"{config.host}:{config.port}: {error.strerror}",
            fix="stop what uses that port, or set serve.port",
        ) from error


def _deploy(config: ServeConfig, application: ray.serve.Application) -> None:
    needed, present = config.replicas * config.num_cpus, ray.cluster_resources().get("CPU", 0)
    if needed > present:
        raise ServeError(
            "Ray has too few CPUs for the engine replicas",
            seen=present,
            expected=f"{needed:g} = serve.replicas x serve.num_cpus",
            fix="lower serve.replicas or serve.num_cpus",
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logging_config = LoggingConfig(log_level="WARNING", enable_access_log=False)
    ray.serve.start(
        proxy_location="HeadOnly",
        http_options={"host": config.host, "port": config.port},
        logging_config=logging_config,
    )
    target = ray.serve.RunTarget(
        target=application, name=APP, route_prefix="/", logging_config=logging_config
    )
    ray.serve.run_many([target], wait_for_applications_running=False)


def _wait_healthy(config: ServeConfig, address: str, stopped: threading.Event) -> None:
    """Until /healthz answers 200. Raises ServeError on a failed deployment or a deadline."""
    deadline = time.monotonic() + config.start_timeout_s
    state = "not deployed"
    while time.monotonic() < deadline and not stopped.is_set():
        app = ray.serve.status().applications.get(APP)
        if app is not None:
            reasons = [app.message, *(part.message for part in app.deployments.values())]
            state = f"{app.status.value}: {' '.join(filter(None, reasons))}"
            if app.status.value in ("DEPLOY_FAILED", "UNHEALTHY"):
                break
            if app.status.value == "RUNNING" and _healthy(address):
                return
        stopped.wait(0.25)
    if stopped.is_set():
        return
    raise ServeError(
        "the service did not become healthy",
        seen=state[-2000:],
        expected=f"GET {address}/healthz to answer 200 within {config.start_timeout_s:g} s",
    )


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _greeting(address: str, model: str) -> str:
    body = f'{{"model": "{model}", "user": "alice", "prompt": "Hello"}}'
    return (
        f"ptuning serves {model} at {address}\n"
        f"  curl {address}/v1/completions -H 'content-type: application/json' -d '{body}'"
    )


@contextmanager
def _stop_signals(*, enabled: bool) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; handlers are put back afterwards."""
    stopped = threading.Event()
    if not enabled:
        yield stopped
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, stop) for kind in kinds}
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
