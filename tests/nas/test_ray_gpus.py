"""GPUs on Ray, declared and not there: who holds how much of one, and where latencies are measured."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nas.config import resolve
from nas.errors import Refused
from nas.plan import make_plan
from nas.workers import ray_meter, ray_pool
from search_space.frame import Frame
from search_space.vocabulary import read
from trainers.evaluate import Job
from trainers.measure import device_name
from trainers.outcome import Outcome, Unfit

pytestmark = pytest.mark.slow
TARGET = Frame(width=64, train_length=64, context=64, batch=1, dtype="float32", vocabulary=64)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Ray's own client leaves sockets and files to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        ray_pool.ray.shutdown()


@pytest.fixture
def job(tiny: Callable[..., dict[str, Any]]) -> Job:
    plan = make_plan(resolve(tiny()))
    return plan.job(plan.starts[0].layout)


def tell(_job: Job, _text: object, _far: bool) -> Outcome:
    return Unfit(why=f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")


def answers(pool: ray_pool.RayPool, count: int) -> list[str]:
    said, until = [], time.monotonic() + 120
    while len(said) < count and time.monotonic() < until:
        done = pool.next_done(0.5)
        if done is not None:
            assert isinstance(done[1], Unfit), done
            said.append(done[1].why)
    return said


def test_a_whole_gpu_is_one_trials_alone_and_so_is_its_process(
    quiet: None, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    del quiet
    monkeypatch.setattr(ray_pool, "work", tell)
    pool = ray_pool.RayPool(2, None, gpus=1.0, local_gpus=1)
    assert (pool.gpus, pool.capacity) == (1.0, 1)
    pool.submit(0, job)
    pool.submit(1, job)
    first, second = (answer.split() for answer in answers(pool, 2))
    assert first[1] == second[1] == "0" and first[0] != second[0]
    pool.stop()


def test_gpus_are_shared_out_among_the_workers_and_a_whole_one_waits_until_they_have_left(
    quiet: None, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    del quiet

    def slow(job: Job, text: object, far: bool) -> Outcome:
        time.sleep(2)
        return tell(job, text, far)

    monkeypatch.setattr(ray_pool, "work", slow)
    monkeypatch.setattr(ray_meter, "LINGER_S", 0.5)
    pool = ray_pool.RayPool(2, None, gpus=None, local_gpus=1)
    assert (pool.gpus, pool.capacity) == (0.5, 2)
    pool.submit(0, job)
    pool.submit(1, job)
    # The device is this machine's CPU; what it holds is the GPU that Ray believes in.
    meter = ray_meter.RayMeter(2, None, "cpu", gpus=1.0)
    assert pool.next_done(0.0) is not None and pool.next_done(0.0) is not None
    assert meter.name == device_name("cpu")
    layer = read("full").layers[0]
    latency = meter.layer(layer, TARGET, "decode")
    assert latency.latency_ms > 0 and latency.repetitions >= 1
    assert meter.network(read("2*full"), TARGET, "prefill").latency_ms > 0
    assert meter.seconds(job) > 0
    with pytest.raises(ValueError, match="GiB are free"):
        meter.layer(layer, Frame(**{**vars(TARGET), "context": 10**13, "max_length": 10**13}), "decode")
    # It leaves the GPU to the trials when nothing more is asked.
    pool.submit(2, job)
    assert len(answers(pool, 1)) == 1
    pool.stop()


def test_a_trial_that_no_node_has_room_for_is_refused(quiet: None) -> None:
    del quiet
    with pytest.raises(Refused, match="needs one core and 1 GPU"):
        ray_pool.RayPool(2, None, gpus=1.0, local_gpus=0)
    assert not ray_pool.ray.is_initialized()
    ray_pool.connect(1, None, 0)
    with pytest.raises(Refused, match="cuda is asked for, and the cluster at this machine has no GPU"):
        ray_meter.RayMeter(1, None, "cuda")
    assert not ray_pool.ray.is_initialized()


def test_the_commonest_kind_of_gpu_is_measured_on() -> None:
    nodes = [
        {"CPU": 8.0},
        {"GPU": 4.0, "accelerator_type:A100": 1.0},
        {"GPU": 2.0, "accelerator_type:H100": 1.0},
        {"GPU": 2.0, "accelerator_type:H100": 1.0},
    ]
    assert ray_meter._commonest(nodes) == "accelerator_type:A100"
    assert ray_meter._commonest([*nodes, nodes[2]]) == "accelerator_type:H100"
    assert ray_meter._commonest([{"CPU": 1.0, "GPU": 1.0}]) is None
