"""Measuring on Ray, where the GPUs are: each latency on a whole one, all of a study's on the same kind."""

import threading
from collections.abc import Callable
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from nas.errors import EXIT_INTERNAL, Refused
from nas.workers.pool import probe_job
from nas.workers.ray_pool import connect, wait_until
from search_space.frame import Frame
from search_space.layout import Layer, Layout
from trainers.evaluate import Job
from trainers.measure import Latency, Phase, device_name, measure_layer, measure_network

LONGEST_S = 1800.0
"""How long to wait for a whole GPU, which the trials that share it must leave first, and for a measurement on it."""
LINGER_S = 2.0
"""How long the process waits for a further measurement: those before a search come one right after the other."""
MOST_TRIES = 3
"""How often a measurement that its machine lost is tried."""


class RayMeter:
    """Measures in a process that holds a whole GPU, on nodes with the commonest kind of it.

    The process stays for the next measurement if that comes soon, and else leaves the GPU to the trials.

    Raises:
        Refused: the cluster cannot be reached, or has no such device.
    """

    def __init__(self, workers: int, address: str | None, device: str, *, gpus: float = 1.0) -> None:
        connect(workers, address)
        if not wait_until(lambda resources: resources.get("GPU", 0) >= gpus, far=address is not None):
            ray.shutdown()
            raise Refused(
                f"{device} is asked for, and the cluster at {address or 'this machine'} has no GPU: "
                "add a node that has one, or set target.device and proxy.device to cpu"
            )
        self.device = device
        kind = _commonest([node["Resources"] for node in ray.nodes() if node["Alive"]]) if gpus else None
        # Ray gives every node with such a GPU one unit of a resource by its name.
        here = {"resources": {kind: 0.001}} if kind else {}
        self.maker = ray.remote(num_cpus=0, num_gpus=gpus, max_restarts=0, max_task_retries=0, **here)(_Bench)
        self.bench: Any = None
        self.lock = threading.Lock()
        self.timer: threading.Timer | None = None
        self.name = ""
        self.name = self._run(_nothing)[0]

    def layer(self, layer: Layer, frame: Frame, phase: Phase) -> Latency:
        """As `measure_layer`."""
        latency: Latency = self._run(measure_layer, layer, frame, phase)[1]
        return latency

    def network(self, network: Layout, frame: Frame, phase: Phase) -> Latency:
        """As `measure_network`."""
        latency: Latency = self._run(measure_network, network, frame, phase)[1]
        return latency

    def seconds(self, job: Job) -> float:
        """As `probe_job`."""
        seconds: float = self._run(_probe, job)[1]
        return seconds

    def _run(self, measure: Callable[..., Any], *subject: Any) -> tuple[str, Any]:
        """What a node measured, and the name of its device; raises ValueError as the measurement does."""
        with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            try:
                return self._try(measure, subject)
            finally:
                self.timer = threading.Timer(LINGER_S, self._leave)
                self.timer.daemon = True
                self.timer.start()

    def _try(self, measure: Callable[..., Any], subject: tuple[Any, ...]) -> tuple[str, Any]:
        why = ""
        for _ in range(MOST_TRIES):
            if self.bench is None:
                self.bench = self.maker.remote()
            try:
                name, value = ray.get(self.bench.run.remote(measure, subject, self.device), timeout=LONGEST_S)
            except RayTaskError as error:
                cause = error.as_instanceof_cause()
                if isinstance(cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                raise cause from None
            except GetTimeoutError:
                self._end()
                raise Refused(
                    f"no whole GPU could be had for {LONGEST_S / 60:.0f} minutes to measure a latency; "
                    "the same command goes on once one is free",
                    EXIT_INTERNAL,
                ) from None
            except RayError as error:
                why = type(error).__name__
                self._end()
                continue
            if self.name in ("", name):
                return str(name), value
            why = f"it came from {name}"
            self._end()
        raise Refused(
            f"latencies of {self.name or self.device} cannot be measured on the cluster: {why}", EXIT_INTERNAL
        )

    def _leave(self) -> None:
        with self.lock:
            self._end()

    def _end(self) -> None:
        bench, self.bench = self.bench, None
        if bench is not None and ray.is_initialized():
            ray.kill(bench)


class _Bench:
    """The process that holds the GPU."""

    def run(self, measure: Callable[..., Any], subject: tuple[Any, ...], device: str) -> tuple[str, Any]:
        """The device's name, and what was measured on it."""
        torch.set_num_threads(1)
        return device_name(device), measure(*subject, device=device)


def _nothing(*, device: str) -> None:
    """For the device's name alone."""
    del device


def _probe(job: Job, *, device: str) -> float:
    del device
    return probe_job(job)


def _commonest(nodes: list[dict[str, float]]) -> str | None:
    """The kind of GPU of which a cluster has most, the first by name of equals; None where Ray tells no kinds."""
    count: dict[str, float] = {}
    for resources in nodes:
        for name in resources:
            if name.startswith("accelerator_type:"):
                count[name] = count.get(name, 0.0) + resources.get("GPU", 0.0)
    return min(count, key=lambda name: (-count[name], name), default=None)
