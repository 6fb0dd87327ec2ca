"""The server as a process: by uvicorn on one machine, by Ray Serve for more."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from collections.abc import Mapping
from typing import Any

from .app import Limits, make_app
from .engine import Engine

API_KEY = "PEFT_ELP_API_KEY"  # the environment variable


def serve(engine: Mapping[str, Any], limits: Limits, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C, and then answer what was taken on.

    Args:
        engine: The arguments of `Engine`.
        limits: What is taken on.
        host: The address.
        port: The port.
    """
    import uvicorn

    _warn_if_open(host)
    app = make_app(Engine(**engine), limits, os.environ.get(API_KEY))
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=round(limits.timeout_s) + 1)


def serve_with_ray(
    engine: Mapping[str, Any], limits: Limits, host: str, port: int, replicas: int, gpus: float = 0
) -> None:
    """Serve from several processes, on all machines of a Ray cluster.

    Args:
        engine: The arguments of `Engine`.
        limits: What each process takes on.
        host: The address.
        port: The port.
        replicas: How many processes answer.
        gpus: GPUs of each process.
    """
    ray_serve = _ray_serve()
    _warn_if_open(host)
    ray_serve.start(http_options={"host": host, "port": port})
    arguments = {"engine": dict(engine), "limits": vars(limits), "replicas": replicas, "gpus": gpus}
    ray_serve.run(deployment(arguments), route_prefix="/")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        signal.pause()
    except KeyboardInterrupt:
        ray_serve.shutdown()  # after the answers that are under way


def deployment(arguments: Mapping[str, Any]) -> Any:
    """Build the application of Ray Serve, also for its configuration files.

    Args:
        arguments: `engine` and `limits`, the arguments of `Engine` and `Limits`; `replicas`, and `gpus` of each.
    """
    ray_serve = _ray_serve()
    limits = Limits(**arguments.get("limits", {}))
    engine = dict(arguments["engine"])

    def build() -> Any:  # in each replica
        return make_app(Engine(**engine), limits, os.environ.get(API_KEY))

    gpus = arguments.get("gpus", 0)
    made: Any = ray_serve.deployment(
        ray_serve.ingress(build)(),
        name="peft_elp",
        num_replicas=arguments.get("replicas", 1),
        ray_actor_options={"num_gpus": gpus, "num_cpus": 0 if gpus else 1},
        max_ongoing_requests=limits.queue,
        max_queued_requests=limits.queue,
        graceful_shutdown_timeout_s=limits.timeout_s,
    )
    return made.bind()


def _ray_serve() -> Any:
    try:
        return importlib.import_module("ray.serve")
    except ImportError as error:
        raise ImportError(f"Several processes need Ray Serve ({error}): pip install 'peft-elp[serve,ray]'") from error


def _warn_if_open(host: str) -> None:
    if host not in ("127.0.0.1", "localhost", "::1") and not os.environ.get(API_KEY):
        warnings.warn(f"Anybody who reaches {host} may ask. Set {API_KEY} to a key for your clients.", stacklevel=3)
