"""Whatever a record may hold comes back equal from every database: floats to the last bit, any text, any JSON."""

from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.records import Axis, LatencyRecord, LayoutRecord, NewTrial, ResultRecord
from storage.store import Store

NAMES = count()
finite = st.floats(allow_nan=False, allow_infinity=False)
# A text column takes any text but these two; a JSON column takes them as well.
column_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
whole = st.integers(-(2**63) + 1, 2**63 - 1)
any_text = st.text(max_size=10)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=8,
)
json_object = st.dictionaries(any_text, json_value, max_size=3)
costs = st.dictionaries(any_text, finite, max_size=3)
axis = st.builds(
    Axis, name=any_text, maximise=st.booleans(), low=finite, high=finite, log=st.booleans(), unit=any_text
)
result = st.builds(
    ResultRecord,
    rung=st.integers(0, 5),
    quality=finite,
    scores=costs,
    details=json_object,
    steps=whole,
    tokens=whole,
    train_s=finite,
    worker_s=finite,
    seed=whole,
)
new_trial = st.builds(
    NewTrial,
    layout=st.builds(
        LayoutRecord, key=st.just(""), text=column_text, layers=st.lists(json_object, max_size=2).map(tuple)
    ),
    origin=column_text,
    params=json_object,
    sampler_attrs=json_object,
    costs=costs,
    layer_costs=st.lists(costs, max_size=2).map(tuple),
    evaluation_key=column_text,
)
latency = st.builds(
    LatencyRecord,
    device=column_text,
    frame=column_text,
    subject=column_text,
    phase=st.sampled_from(["decode", "prefill"]),
    whole=st.booleans(),
    latency_ms=finite,
    spread_ms=finite,
    repetitions=whole,
)
# The store is shared by the examples of one test on purpose: each makes a study of its own.
patient = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@patient
@given(
    name=column_text,
    config=json_object,
    axes=st.lists(axis, max_size=2),
    families=st.dictionaries(any_text, any_text),
)
def test_studies(
    store: Store, name: str, config: dict[str, Any], axes: list[Axis], families: dict[str, str]
) -> None:
    unique = f"{name}#{next(NAMES)}"
    made = store.create_study(name=unique, config=config, config_hash=name, axes=axes, families=families)
    assert store.study(unique) == made
    assert (made.name, made.config, made.config_hash) == (unique, config, name)
    assert (made.axes, made.families) == (tuple(axes), families)


@patient
@given(new=new_trial, measured=result, more=costs)
def test_trials(store: Store, build, new: NewTrial, measured: ResultRecord, more: dict[str, float]) -> None:
    study = build.study(store, f"study {next(NAMES)}")
    layout = LayoutRecord(key=f"key {next(NAMES)}", text=new.layout.text, layers=new.layout.layers)
    given_values = vars(new) | {"layout": layout}
    store.add_trial(study, NewTrial(**given_values))
    assert store.finish_trial(study, 0, store.start_trial(study, 0), measured, costs=more)
    trial = store.trial(study, 0)
    assert trial is not None
    expected = given_values | {"costs": {**new.costs, **more}}
    assert {name: getattr(trial, name) for name in expected} == expected
    assert trial.results == (measured,)
    assert isinstance(trial.result and trial.result.quality, float)


@patient
@given(record=latency)
def test_latencies(store: Store, record: LatencyRecord) -> None:
    store.put_latency(record)
    found = store.latency(
        device=record.device,
        frame=record.frame,
        subject=record.subject,
        phase=record.phase,
        whole=record.whole,
    )
    assert found == record


@patient
@given(kind=column_text, payload=json_object)
def test_events(store: Store, kind: str, payload: dict[str, Any]) -> None:
    seq = store.log(None, kind, payload)
    (read,) = store.events(after=seq - 1, limit=1)
    assert (read.seq, read.kind, read.payload) == (seq, kind, payload)


@pytest.mark.parametrize("value", [5e-324, 1e300, 1e22, 0.1 + 0.2, -1.7976931348623157e308, 1.0])
def test_a_float_stays_a_float_to_the_last_bit(store: Store, build, value: float) -> None:
    study = build.study(store)
    trial = store.add_trial(study, build.trial(costs={"kv_bytes": value}))
    assert trial.costs["kv_bytes"].hex() == value.hex()
