"""Who works on what: claims, leases by the database's clock, fences, what becomes of a dead driver's trials."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select, update

from storage.errors import StorageError
from storage.leases import Lease
from storage.records import State, StudyRecord
from storage.store import Store
from storage.tables import DriverRow, RepeatClaimRow, TrialRow, epoch_now


def kinds(store: Store, study: StudyRecord) -> list[str]:
    return [one.kind for one in store.events(study=study)]


def states(store: Store, study: StudyRecord) -> list[State]:
    return [trial.state for trial in store.trials(study)]


def silence(store: Store, lease: Lease) -> None:
    """As if a driver had said nothing for longer than its lease."""
    with store._database.writing() as connection:
        row = update(DriverRow).where(DriverRow.id == lease.driver_id)
        connection.execute(row.values(lease_until=epoch_now() - 1.0))


def rival(store: Store, study: StudyRecord) -> Lease:
    """Another driver of the study, as if it were in another process; its lease is never renewed."""
    lease = Lease(store._database, study, lease_s=60.0)
    lease.exclusive = (
        False  # a driver that takes a file's only place gives up all others, and that is tested apart
    )
    lease.begin()
    return lease


def test_a_trial_is_opened_once_and_no_more_than_are_wanted(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        opened = store.open_trial(study, build.trial(1), lease, most=2)
        assert opened is not None
        trial, attempt = opened
        assert (trial.number, trial.state, attempt) == (0, "waiting", 1)
        assert states(store, study) == ["running"]
        assert store.open_trial(study, build.trial(1), lease, most=2) is None  # the same layout
        assert store.open_trial(study, build.trial(2), lease, most=2) is not None
        assert store.open_trial(study, build.trial(3), lease, most=2) is None  # enough
        assert kinds(store, study) == ["driver_started", *["trial_waiting", "trial_running"] * 2]


def test_waiting_trials_are_claimed_in_order_and_once(store: Store, build) -> None:
    study = build.study(store)
    for index in range(4):
        store.add_trial(study, build.trial(index))
    with store.writer(study) as lease:
        other = rival(store, study)
        assert store.claim_waiting(study, lease) == (0, 1)
        assert store.claim_waiting(study, other) == (1, 1)
        assert store.claim_trial(study, 1, lease) is None
        assert store.claim_trial(study, 2, lease) == 1
        assert store.claim_waiting(study, other) == (3, 1)
        assert store.claim_waiting(study, lease) is None


def test_claims_at_the_same_moment_are_disjoint(server, build) -> None:
    with Store.open(server.new_database()) as store:
        study = build.study(store)
        for index in range(40):
            store.add_trial(study, build.trial(index))
        leases = [rival(store, study) for _ in range(4)]
        found: list[list[int]] = [[] for _ in leases]

        def take(place: int) -> None:
            while claimed := store.claim_waiting(study, leases[place]):
                found[place].append(claimed[0])

        threads = [threading.Thread(target=take, args=(place,)) for place in range(len(leases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Each passes over what another is taking at that moment, and comes back for nothing: none is left.
        assert sorted(number for own in found for number in own) == list(range(40))
        assert all(own == sorted(own) for own in found)


def test_fault_07_a_zombie_that_returns_late_is_rejected_and_noted_once(store: Store, build) -> None:
    study = build.study(store)
    zombie = rival(store, study)
    opened = store.open_trial(study, build.trial(), zombie, most=9)
    assert opened is not None
    silence(store, zombie)
    with store.writer(study) as lease:
        if not lease.exclusive:  # of a file, all others were given up with the place
            assert "driver_silent" not in kinds(store, study)
        assert store.requeue_abandoned(study) == [0]
        assert store.claim_waiting(study, lease) == (0, 2)
        assert not store.finish_trial(study, 0, 1, build.result)
        assert kinds(store, study).count("late_result_rejected") == 1
        assert zombie.renew() is False  # it has another place now, under which nothing is claimed
        assert store.finish_trial(study, 0, 2, build.result)
        assert states(store, study) == ["done"] and len(store.trials(study)[0].results) == 1
    given_up = "driver_gone" if lease.exclusive else "driver_silent"
    assert kinds(store, study).count(given_up) == 1


def test_a_driver_that_renews_keeps_its_trials(store: Store, build) -> None:
    study = build.study(store)
    other = rival(store, study)
    assert store.open_trial(study, build.trial(), other, most=9) is not None
    silence(store, other)
    assert other.renew() is True  # nobody had given it up yet
    assert store.requeue_abandoned(study) == []
    assert store.finish_trial(study, 0, 1, build.result)


def test_a_lease_is_renewed_by_itself(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study, lease_s=1.0) as lease:
        store.open_trial(study, build.trial(), lease, most=9)
        ends = (time.monotonic() + 2.5, select(func.max(DriverRow.lease_until) - epoch_now()))
        while time.monotonic() < ends[0]:
            assert store.requeue_abandoned(study) == []
            time.sleep(0.1)
        with store._database.reading() as connection:
            assert 0 < connection.execute(ends[1]).scalar_one() <= 1.0
    assert kinds(store, study)[-1] == "driver_ended"
    assert store.requeue_abandoned(study) == [0]


def test_fault_26_the_wall_clock_of_a_driver_means_nothing(
    store: Store, build, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = build.study(store)
    real = time.time
    with store.writer(study) as lease:
        store.open_trial(study, build.trial(), lease, most=9)
        for skew_s in (3600.0, -3600.0):
            monkeypatch.setattr(time, "time", lambda skew_s=skew_s: real() + skew_s)
            assert lease.renew() and store.requeue_abandoned(study) == []
        assert store.finish_trial(study, 0, 1, build.result)


def test_the_only_writer_of_a_file_takes_over_at_once(tmp_path: Any, build) -> None:
    with Store.open(f"sqlite:///{tmp_path}/nas.db") as store:
        study = build.study(store)
        dead = rival(store, study)
        store.open_trial(study, build.trial(), dead, most=9)
        with store.writer(study) as lease:
            assert lease.exclusive and "driver_gone" in kinds(store, study)
            assert store.requeue_abandoned(study) == [0]


@pytest.mark.parametrize("last", ["lost", "quarantined"])
def test_so_many_failures_in_a_row_end_a_trial(store: Store, build, last: Any) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        store.open_trial(study, build.trial(), lease, most=9)
        for attempt in (1, 2):
            assert store.lose_trial(study, 0, attempt, "died", last=last, most=3) == "waiting"
            assert store.lose_trial(study, 0, attempt, "died", last=last, most=3) is None
            assert store.claim_waiting(study, lease) == (0, attempt + 1)
        assert store.lose_trial(study, 0, 3, "died of it", last=last, most=3) == last
        trial = store.trials(study)[0]
        assert (trial.state, trial.why, trial.attempts) == (last, "died of it", 3)
        assert store.claim_waiting(study, lease) is None


def test_what_brought_a_result_had_not_failed(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        store.open_trial(study, build.trial(), lease, most=9)
        store.lose_trial(study, 0, 1, "died", last="lost", most=2)
        attempt = store.claim_trial(study, 0, lease)
        assert attempt is not None
        assert store.finish_trial(study, 0, attempt, build.result, state="pruned")
        attempt = store.claim_trial(study, 0, lease)
        assert attempt is not None
        assert store.lose_trial(study, 0, attempt, "died", last="lost", most=2) == "waiting"


def test_the_death_of_drivers_is_no_failure_of_their_trial(store: Store, build) -> None:
    study = build.study(store)
    store.add_trial(study, build.trial())
    for attempt in range(1, 8):
        driver = rival(store, study)
        assert store.claim_waiting(study, driver) == (0, attempt)
        silence(store, driver)
        assert store.requeue_abandoned(study) == [0]
    assert store.claim_waiting(study, rival(store, study)) == (0, 8)
    assert store.lose_trial(study, 0, 8, "died", last="lost", most=2) == "waiting"


def test_what_is_set_aside_is_known_by_what_it_trains(store: Store, build) -> None:
    study = build.study(store)
    new = replace(build.trial(), evaluation_key="poison")
    assert store.set_aside("poison") is None
    with store.writer(study) as lease:
        store.open_trial(study, new, lease, most=9)
        store.lose_trial(study, 0, 1, "segmentation fault", last="quarantined", most=1)
    assert store.set_aside("poison") == "as trial 0 of study 'first': segmentation fault"
    store.retry_trials(study, [0])
    assert store.set_aside("poison") is None


def test_only_what_ended_without_a_result_is_tried_again_and_all_or_nothing(store: Store, build) -> None:
    study = build.study(store)
    endings: tuple[Any, ...] = ("unfit", "lost", "quarantined")
    with store.writer(study) as lease:
        for index in range(4):
            store.open_trial(study, build.trial(index), lease, most=9)
        for number, state in enumerate(endings):
            store.fail_trial(study, number, 1, state, "why")
        store.finish_trial(study, 3, 1, build.result)
        with pytest.raises(
            StorageError, match="trial 3 of study 'first' is done: only one that is unfit, lost or"
        ):
            store.retry_trials(study, [0, 3])
        with pytest.raises(StorageError, match="has no trial 9"):
            store.retry_trials(study, [0, 9])
        assert states(store, study) == [*endings, "done"]
        assert store.retry_trials(study, [2, 0, 1, 1]) == [0, 1, 2]
        assert store.trials(study)[0].why == ""
        assert [store.claim_waiting(study, lease) for _ in range(4)] == [(0, 2), (1, 2), (2, 2), None]


def test_a_further_seed_is_claimed_once_until_it_is_there_or_its_driver_gone(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        other = rival(store, study)
        store.open_trial(study, build.trial(), lease, most=9)
        store.finish_trial(study, 0, 1, build.result)
        assert store.claim_repeat(study, 0, 7, lease, most=9) and store.claim_repeat(
            study, 0, 7, lease, most=9
        )
        assert not store.claim_repeat(study, 0, 7, other, most=9)
        assert store.claim_repeat(study, 0, 8, other, most=9)
        assert store.claimed_repeats(study) == [(0, 7, lease.driver_id), (0, 8, other.driver_id)]
        assert store.add_repeat(study, 0, "seven", replace(build.result, seed=7))
        assert not store.claim_repeat(study, 0, 7, other, most=9)
        silence(store, other)
        store.requeue_abandoned(study)
        assert store.claimed_repeats(study) == []
        assert store.claim_repeat(study, 0, 8, lease, most=9)
    with store._database.reading() as connection:
        assert connection.execute(select(func.count()).select_from(RepeatClaimRow)).scalar() == 0


def test_further_seeds_are_claimed_up_to_their_number(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        other = rival(store, study)
        for number in range(2):
            store.open_trial(study, build.trial(number), lease, most=9)
            store.finish_trial(study, number, 1, build.result)
        assert store.claim_repeat(study, 0, 7, lease, most=2) and store.claim_repeat(
            study, 1, 7, other, most=2
        )
        assert not store.claim_repeat(study, 1, 8, lease, most=2)
        assert store.claim_repeat(study, 0, 7, lease, most=2)  # its own stays its own
        store.add_repeat(study, 0, "seven", replace(build.result, seed=7))
        assert not store.claim_repeat(study, 1, 8, lease, most=2)
        assert not store.claim_repeat(study, 1, 8, other, most=2)
        silence(store, other)
        store.requeue_abandoned(study)
        assert store.claim_repeat(study, 1, 8, lease, most=2)
        assert not store.claim_repeat(study, 0, 8, lease, most=2)


def test_drivers_at_the_same_moment_claim_no_more_further_seeds_than_there_are_to_be(server, build) -> None:
    with Store.open(server.new_database()) as store:
        study = build.study(store)
        with store.writer(study) as lease:
            for number in range(4):
                store.open_trial(study, build.trial(number), lease, most=9)
                store.finish_trial(study, number, 1, build.result)
        leases = [rival(store, study) for _ in range(4)]
        ready = threading.Barrier(len(leases))

        def take(place: int) -> None:
            for most in range(1, 21):
                ready.wait()  # no two want the same, and there is room for one more
                store.claim_repeat(study, place, most, leases[place], most=most)

        threads = [threading.Thread(target=take, args=(place,)) for place in range(len(leases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [seed for _, seed, _ in sorted(store.claimed_repeats(study), key=lambda claim: claim[1])] == [
            *range(1, 21)
        ]


def test_what_changed_is_told_from_the_last_event_on(store: Store, build) -> None:
    study = build.study(store)
    with store.writer(study) as lease:
        store.open_trial(study, build.trial(1), lease, most=9)
        seen, _ = store.changed_trials(study, None)
        assert store.changed_trials(study, seen) == (seen, [])
        store.open_trial(study, build.trial(2), lease, most=9)
        store.finish_trial(study, 0, 1, build.result)
        seen, numbers = store.changed_trials(study, seen)
        assert numbers == [0, 1] and (seen, []) == store.changed_trials(study, None)
        store.log(study, "another_thing", {})
        assert store.changed_trials(study, seen) == (seen + 1, [])


# Whatever drivers do and whichever of them die, a trial has one result, and none is forgotten.
STEPS = st.lists(
    st.tuples(st.sampled_from(["open", "claim", "finish", "lose", "die", "sweep"]), st.integers(0, 2)),
    max_size=40,
)


@pytest.fixture(params=["sqlite-memory", "postgresql"])
def fresh(request: pytest.FixtureRequest) -> Iterator[Callable[[], Store]]:
    with ExitStack() as opened:

        def make() -> Store:
            if request.param == "postgresql":
                if not stores:
                    stores.append(
                        opened.enter_context(Store.open(request.getfixturevalue("server").new_database()))
                    )
                return stores[0]
            return opened.enter_context(Store.open("sqlite://"))

        stores: list[Store] = []
        yield make


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_no_history_of_drivers_loses_or_doubles_a_trial(
    fresh: Callable[[], Store], build, steps: Any
) -> None:
    store = fresh()
    study = build.study(store, f"study {len(store.studies())}")
    drivers = [rival(store, study) for _ in range(3)]
    held: list[dict[int, int]] = [{} for _ in drivers]
    opened = 0
    committed: list[int] = []
    for step, who in steps:
        own = held[who]
        match step:
            case "open":
                found = store.open_trial(study, build.trial(opened), drivers[who], most=99)
                assert found is not None
                own[found[0].number] = found[1]
                opened += 1
            case "claim":
                if claimed := store.claim_waiting(study, drivers[who]):
                    own[claimed[0]] = claimed[1]
            case "finish" if own:
                number, attempt = own.popitem()
                committed += [number] * store.finish_trial(study, number, attempt, build.result)
            case "lose" if own:
                number, attempt = own.popitem()
                store.lose_trial(study, number, attempt, "died", last="lost", most=99)
            case "die":  # its results may come back late all the same
                silence(store, drivers[who])
            case "sweep":
                store.requeue_abandoned(study)
                drivers[who].renew()
    for lease in drivers:
        silence(store, lease)
    store.requeue_abandoned(study)
    last = rival(store, study)
    while claimed := store.claim_waiting(study, last):
        committed += [claimed[0]] * store.finish_trial(study, *claimed, build.result)
    assert sorted(committed) == list(range(opened))
    with store._database.reading() as connection:
        own_trials = select(TrialRow.state).where(TrialRow.study_id == study.id)
        assert set(connection.execute(own_trials).scalars()) <= {"done"}
