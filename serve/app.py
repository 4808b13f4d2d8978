"""The service's life cycle: build the Ray Serve application, start it, wait, shut it down."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from serve import local_ray, logs  # first: it sets variables that ray reads at import

# isort: split
import ray
import ray.exceptions
import ray.serve
from ray.serve.config import BackpressureConfig
from ray.serve.schema import LoggingConfig

from ptuning.data.encode import TemplateKind
from ptuning.errors import ServeError
from ptuning.model.facts import BackboneConfig
from ptuning.model.locate import locate_model
from ptuning.store import Store
from ptuning.store_identity import read_identity
from ptuning.system.ports import free_port
from serve.config import ServeConfig
from serve.http.auth import Keys, check_exposure
from serve.replica import EngineReplica, HttpReplica

log = logging.getLogger(logs.LOGGER)

APP = "ptuning"
_POLL_SECONDS = 1.0  # between checks of a running service
_SILENCE_SECONDS = 30.0  # after this long without contact, Ray counts as lost
_SLACK = 32  # requests beyond rows and queue: refused ones, health checks


def served_name(config: ServeConfig, backbone: BackboneConfig) -> str:
    """The name in /v1/models: the configured name, or the model's, without directories."""
    if config.model_name:
        return config.model_name
    name = locate_model(backbone.name).name
    return Path(name).name if name.startswith("/") else name


def build(
    config: ServeConfig,
    *,
    store: str,
    backbone: BackboneConfig,
    template: TemplateKind,
) -> ray.serve.Application:
    """Build the application without running it. Raises ConfigError and ModelNotFound.

    Ray must be running, unless `serve.num_gpus` is configured.
    """
    check_exposure(config)
    if config.api_keys_file is not None:
        Keys.read(config.api_keys_file)  # a bad file should fail here, not in a replica
        config = config.model_copy(
            update={"api_keys_file": str(Path(config.api_keys_file).resolve())}
        )
    capacity = config.max_rows + config.max_queue + _SLACK
    identity = read_identity(Store(store))
    if config.log_file is not None:
        config = config.model_copy(update={"log_file": str(Path(config.log_file).resolve())})
    engine = ray.serve.deployment(
        name="Engine",
        num_replicas=config.replicas,
        ray_actor_options={
            "num_cpus": config.num_cpus,
            "num_gpus": _gpus_of(config, backbone),
            "runtime_env": {"env_vars": _engine_environment()},
        },
        max_ongoing_requests=capacity,
        max_queued_requests=_SLACK,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=1,
    )(EngineReplica).bind(config, backbone, template, Store(store).root)
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
    return http.bind(config, served_name(config, backbone), engine, identity)


def _gpus_of(config: ServeConfig, backbone: BackboneConfig) -> float:
    """GPUs per engine replica. Without a reservation a replica would still see every device, and
    would use one that is reserved for another process."""
    if config.num_gpus is not None:
        return config.num_gpus
    present = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    return 1.0 if present and not backbone.device.startswith("cpu") else 0.0


def _engine_environment() -> dict[str, str]:
    """An engine's environment variables, which must be set before torch is imported.

    Waiting OpenMP threads spin, which is ruinous if other processes need the cores (2 cores,
    load 6: 4 answers took 260 s, and 6 s with passive waiting).
    """
    return {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}


class Running:
    """A running service; `close`, or leaving its `with` block, stops it."""

    def __init__(self, config: ServeConfig, *, owns_ray: bool) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.address = f"http://{host}:{config.port}"
        self._owns_ray = owns_ray

    def close(self) -> None:
        """Stop the service, and Ray too if `run` started it. May be called twice."""
        if not ray.is_initialized():
            return
        try:
            applications = ray.serve.status().applications
            if APP in applications:
                ray.serve.delete(APP)  # lets running requests finish
            # Shutting down Ray would stop Serve anyway.
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
    blocking: bool = True,
) -> Running:
    """Start the service on this machine and wait until it is healthy.

    Uses the Ray of this process if there is one, or else starts a local one. With `blocking` it
    prints the address, then the service's log lines (on standard error), and returns after SIGINT
    or SIGTERM, when everything has stopped. Raises ConfigError, ModelNotFound, or ServeError if the
    port is taken, the service does not start, or it dies later.
    """
    check_exposure(config)
    config = config.model_copy(update={"port": _free_port(config)})
    name = served_name(config, backbone)
    owns_ray = local_ray.start_ray(max(1.0, config.replicas * config.num_cpus))
    running = Running(config, owns_ray=owns_ray)
    # After starting Ray, which installs signal handlers.
    with _stop_signals(enabled=blocking) as stopped, _log_file(config, enabled=blocking) as config:
        try:
            application = build(
                config,
                store=store,
                backbone=backbone,
                template=template,
            )
            _deploy(config, backbone, application)
            _wait_ready(config, running.address, stopped)
            if blocking and not stopped.is_set():
                print(_greeting(running.address, name), flush=True)
                _watch(config, running.address, stopped)
        except BaseException:
            running.close()
            raise
        if blocking:
            running.close()
    return running


@contextmanager
def _log_file(config: ServeConfig, *, enabled: bool) -> Iterator[ServeConfig]:
    """The configuration with a file for the replicas' log lines, temporary if none is set."""
    if not enabled or config.log_file is not None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="ptuning-serve-") as folder:
        yield config.model_copy(update={"log_file": f"{folder}/log"})


def _free_port(config: ServeConfig) -> int:
    """The configured port, or any free one for 0. Raises ServeError if it is taken."""
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


def _deploy(
    config: ServeConfig, backbone: BackboneConfig, application: ray.serve.Application
) -> None:
    present = ray.cluster_resources()
    gpus = _gpus_of(config, backbone)
    needs = (("CPU", "num_cpus", config.num_cpus), ("GPU", "num_gpus", gpus))
    for resource, setting, each in needs:
        if config.replicas * each > present.get(resource, 0):
            raise ServeError(
                f"Ray has too few {resource}s for the engine replicas",
                seen=present.get(resource, 0),
                expected=f"{config.replicas * each:g} = serve.replicas x serve.{setting}",
                fix=f"lower serve.replicas or serve.{setting}",
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


def _wait_ready(config: ServeConfig, address: str, stopped: threading.Event) -> None:
    """Wait until every replica runs and /readyz answers 200. Raises ServeError if the deployment
    fails or the deadline passes."""
    deadline = time.monotonic() + config.start_timeout_s
    state, reason = "not deployed", ""
    while time.monotonic() < deadline and not stopped.is_set():
        state, reason = _app_state()
        if state in ("DEPLOY_FAILED", "UNHEALTHY"):
            break
        if state == "RUNNING" and _is_ready(address):
            return
        stopped.wait(0.25)
    if stopped.is_set():
        return
    raise ServeError(
        "the service did not become healthy",
        seen=f"{state}: {reason}"[-2000:],
        expected=f"GET {address}/readyz to answer 200 within {config.start_timeout_s:g} s",
    )


def _watch(config: ServeConfig, address: str, stopped: threading.Event) -> None:
    """Print the replicas' log lines until a signal arrives. Raises ServeError if the service has
    died, or has not answered for as long as a start may take."""
    follower = logs.Follower(config.log_file) if config.log_file is not None else None
    last_ready = time.monotonic()
    try:
        while not stopped.wait(_POLL_SECONDS):
            for line in follower.lines() if follower else ():
                print(line, file=sys.stderr, flush=True)
            now = time.monotonic()
            state, reason = _app_state()
            if state == "RUNNING" or _is_ready(address):
                last_ready = now
            if problem := find_death(state, now - last_ready, config.start_timeout_s):
                raise ServeError(problem, seen=f"{state}: {reason}"[-2000:])
    finally:
        if follower is not None:
            follower.close()


def find_death(state: str, idle_s: float, patience_s: float) -> str | None:
    """Why to give up on a service, given its state in Ray Serve and the seconds since it last
    answered; None while it is alive or may recover.

    While a replica is being replaced, the application is unhealthy for a while.
    """
    if state in ("ABSENT", "DEPLOY_FAILED", "DELETING"):
        return "the service has died"
    limit = min(patience_s, _SILENCE_SECONDS) if state == "UNKNOWN" else patience_s
    return f"the service has not answered for {idle_s:.0f} s" if idle_s > limit else None


def _app_state() -> tuple[str, str]:
    """The application's state in Ray Serve, with reasons; ABSENT if there is none, UNKNOWN if Ray
    does not answer."""
    try:
        app = ray.serve.status().applications.get(APP)
    except Exception as error:  # noqa: BLE001 - Ray raises many unrelated types
        return "UNKNOWN", logs.describe(error)
    if app is None:
        return "ABSENT", ""
    reasons = [app.message, *(part.message for part in app.deployments.values())]
    return app.status.value, " ".join(filter(None, reasons))


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5) as answer:
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
    """An event that SIGINT and SIGTERM set; the handlers are restored afterwards."""
    stopped = threading.Event()
    if not enabled:
        yield stopped
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
