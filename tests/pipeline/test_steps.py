"""The pipeline as a whole: what starts a run, what its gates decide, what an alarm leads to."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.errors import FedLLMError
from fedllm.files import SIGNATURE
from scripts.pipeline.metrics import pipeline_samples
from scripts.pipeline.state import PipelineState, write_state
from scripts.pipeline.steps import promote
from tests.pipeline.conftest import Town, World
from tests.registry.test_kills import killed_at, state_of

GOOD = {0: 5.0, 1: 4.0, 2: 4.2, 3: 3.5, 4: 3.4}  # the adapter of run 2 is worse than that of run 1
CHANGED = {0: 5.5, 1: 4.6, 2: 4.7, 3: 4.0, 4: 3.9}  # other text: all are worse, that of run 3 least
BACK = {**GOOD, 3: 4.5}  # the text of before, which run 3 has forgotten
STORY = [
    World(GOOD),  # the first run becomes version 1
    World(GOOD),
    World(GOOD, num_rows=160),  # new rows: run 2 is refused
    World(GOOD, num_rows=160),
    World(CHANGED, num_rows=160),  # drift: run 3 becomes version 2
    World(CHANGED, num_rows=160),
    World(CHANGED, num_rows=160),
    World(BACK, num_rows=160),  # drift again: version 1 is better on this text
]


def test_the_story_of_three_runs_and_a_rollback(make_town: Callable[..., Town]) -> None:
    town = make_town()
    in_use = [(town.look(world).cycle, town.in_use) for world in STORY]
    assert in_use == [(1, 1), (1, 1), (2, 1), (2, 1), (3, 2), (3, 2), (3, 2), (3, 1)]
    events = [entry["event"] for entry in town.pipeline.registry.entries()]
    assert events == [
        *("added", "promoted", "kept", "drift", "added", "promoted", "drift", "rolled-back"),
        "rollback-reason",
    ]
    (kept,) = town.events("kept")
    assert kept["run"] == "run-0002"
    assert kept["gates"].startswith("held-out -0.2, limit ")
    assert town.pipeline.registry.version(2).statement.gates["held-out"]["passed"] is True
    town.pipeline.registry.verify()
    samples = pipeline_samples(town.pipeline, town.state())
    assert {one.metric.name: one.value for one in samples}["version_in_use"] == 1


def test_a_run_starts_from_the_signed_version_in_use(make_town: Callable[..., Town]) -> None:
    town = make_town()
    for world in STORY[:3]:
        town.look(world)
    start = town.pipeline.folder / "run-0002" / "start"
    version = town.pipeline.registry.version(1)
    assert (start / SIGNATURE).read_bytes() == (version.folder / SIGNATURE).read_bytes()
    assert {file.name for file in start.iterdir()} == {file.name for file in version.folder.iterdir()}


def test_nothing_is_trained_from_a_marked_version(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(STORY[0])
    town.pipeline.registry.mark(1, "made with rows that were withdrawn")
    town.look(World(GOOD | {2: 3.0}, num_rows=160))
    (failed,) = town.events("failed")
    assert "version 1 is in use and marked" in failed["reason"]
    assert not (town.pipeline.folder / "run-0002").exists()
    assert (town.in_use, len(town.pipeline.registry.versions())) == (1, 1)


def test_new_rows_count_from_the_last_run_even_a_refused_one(make_town: Callable[..., Town]) -> None:
    town = make_town()
    cycles = [town.look(World(GOOD, num_rows=number)).cycle for number in (99, 147, 150, 198, 201)]
    assert cycles == [1, 1, 2, 2, 3]


def test_the_calendar_starts_a_run(make_town: Callable[..., Town]) -> None:
    town = make_town("[trigger]\nevery-days = 7\n")
    cycles = []
    for days in (0.0, 6.9, 7.0, 13.9, 14.1):
        town.pipeline = replace(town.pipeline, now=lambda days=days: days * 86_400)
        cycles.append(town.look(World(GOOD)).cycle)
    assert cycles == [1, 1, 2, 2, 3]


def test_a_drift_that_no_version_caused_trains_on(make_town: Callable[..., Town]) -> None:
    town = make_town()
    third = {**GOOD, 2: 3.9}  # runs 1 and 2 both are promoted
    for number in (100, 100, 160, 160, 160):
        town.look(World(third, num_rows=number))
    assert town.in_use == 2
    state = town.look(World(CHANGED | {2: 4.4, 3: 4.0}, num_rows=160))
    assert (state.cycle, town.in_use, town.events("rolled-back")) == (3, 3, [])
    assert state.reason == "drift of anna, ben, cem"


def test_drift_may_only_warn(make_town: Callable[..., Town]) -> None:
    town = make_town("[trigger]\ndrift = false\n")
    for world in STORY[:4]:
        town.look(replace(world, num_rows=100))
    assert town.look(replace(STORY[4], num_rows=100)).cycle == 1
    assert [entry["clients"] for entry in town.events("drift")] == ["anna, ben, cem"]


def test_a_worse_worst_client_keeps_the_version_in_use(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(World(GOOD))
    town.pipeline = replace(town.pipeline, federate=unfair(town))
    town.look(World({**GOOD, 2: 3.0}, num_rows=160))
    assert town.in_use == 1
    assert "worst-client" in town.events("kept")[0]["gates"]


def unfair(town: Town) -> Callable[..., None]:
    """Return runs whose new adapter serves `anna` worse than before."""

    def federate(words: list[str]) -> None:
        whole = town.world
        if "evaluation.every=only" not in words:
            town.world = Unfair(whole.losses, whole.num_rows)
        try:
            town.federate(words)
        finally:
            town.world = whole

    return federate


class Unfair(World):
    """A world in which run 2 gained for all but one client."""

    def of(self, adapter: int) -> dict[str, float]:
        """Return the losses: that of `anna` under run 2 is large."""
        return {**super().of(adapter), **({"anna": 4.3} if adapter == 2 else {})}


def test_a_failed_run_changes_nothing_and_is_tried_again(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(World(GOOD))
    once = replace(town.pipeline, federate=failing(town))
    town.pipeline, whole = once, town.pipeline
    assert town.look(World(GOOD, num_rows=160)).has_failed
    assert town.events("failed")[0]["reason"] == "all is lost"
    town.pipeline = whole
    state = town.look(World({**GOOD, 3: 3.5}, num_rows=160))
    assert (state.cycle, state.has_failed, town.in_use) == (3, False, 2)


def failing(town: Town) -> Callable[..., None]:
    """Return runs that fail; looks succeed."""

    def federate(words: list[str]) -> None:
        if "evaluation.every=only" not in words:
            raise FedLLMError("all is lost")
        town.federate(words)

    return federate


def test_a_start_that_was_altered_passes_no_gate(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(World(GOOD))

    def federate(words: list[str]) -> None:
        town.federate(words)
        for card in town.pipeline.folder.glob("run-0002/start/README.md"):
            card.write_text("# Another card\n")

    town.pipeline = replace(town.pipeline, federate=federate)
    town.look(World({**GOOD, 2: 3.0}, num_rows=160))
    assert town.in_use == 1
    assert town.events("kept")[0]["gates"] == "signature False, limit True"


def test_no_run_begins_beyond_the_epsilon_of_all_runs(make_town: Callable[..., Town]) -> None:
    town = make_town("[trigger]\nnew-rows = 10\n[gates]\nepsilon = 5.0\n")
    town.pipeline = replace(town.pipeline, epsilon_of_run=lambda: 3.0, federate=failing(town))
    states = [town.look(World(GOOD, num_rows=number)) for number in (100, 200, 300)]
    assert [state.cycle for state in states] == [1, 1, 1], "a run that failed may have spent its epsilon"
    assert town.told[-1] == "no run (the run before has failed): epsilon 3 of 5 is spent"


def test_a_step_of_another_version_is_refused(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.pipeline.folder.mkdir()
    write_state(town.pipeline.folder, PipelineState(step="publish"))
    with pytest.raises(FedLLMError, match=r"state.json: step 'publish' is of another version"):
        town.look(World(GOOD))


def test_a_version_that_a_person_put_into_use_stays(make_town: Callable[..., Town]) -> None:
    town = make_town()
    for world in STORY[:5]:
        town.look(world)

    def federate(words: list[str]) -> None:
        town.federate(words)
        if "run.name=run-0004" in words:
            town.pipeline.registry.promote(1)

    town.pipeline = replace(town.pipeline, federate=federate)
    town.look(World(CHANGED, num_rows=250))
    assert town.in_use == 1
    assert town.events("kept")[-1]["gates"] == "version 1 was put into use meanwhile"


@pytest.mark.parametrize("change", ["mark", "promote"])
def test_a_rollback_waits_for_nothing_a_person_changed(make_town: Callable[..., Town], change: str) -> None:
    town = make_town()
    for world in STORY[:-1]:
        town.look(world)
    registry = town.pipeline.registry
    third = registry.add(town.pipeline.folder / "run-0002", town.pipeline.key).number

    def federate(words: list[str]) -> None:
        town.federate(words)
        start = town.pipeline.folder / "look" / "start"
        if (start / SIGNATURE).read_bytes() == (registry.version(1).folder / SIGNATURE).read_bytes():
            registry.mark(1, "withdrawn") if change == "mark" else registry.promote(third)

    town.pipeline = replace(town.pipeline, federate=federate)
    assert town.look(STORY[-1]).step == "watch"
    assert town.in_use == (2 if change == "mark" else third)
    assert town.told[-1] == "no rollback to version 1: the registry was changed meanwhile"


def test_a_version_marked_before_its_promotion_is_kept(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(World(GOOD))
    state = replace(town.state(), step="promote", target=1, parent=0)
    town.pipeline.registry.mark(1, "withdrawn")
    assert promote(town.pipeline, state).step == "watch"
    assert town.events("kept")[0]["gates"] == "withdrawn"


def test_a_parent_marked_during_the_run_keeps_it_out(make_town: Callable[..., Town]) -> None:
    town = make_town()
    town.look(World(GOOD))

    def federate(words: list[str]) -> None:
        town.federate(words)
        if "run.name=run-0002" in words:
            town.pipeline.registry.mark(1, "withdrawn")

    town.pipeline = replace(town.pipeline, federate=federate)
    town.look(World({**GOOD, 2: 3.0}, num_rows=160))
    assert (town.in_use, town.events("kept")[0]["gates"]) == (1, "withdrawn")


@pytest.mark.parametrize(
    ("every", "story"),
    [(31, STORY[:1]), pytest.param(1, STORY, marks=pytest.mark.soak)],
    ids=["some-writes", "all-writes"],
)
def test_a_kill_at_any_write_changes_no_outcome(
    make_town: Callable[..., Town], tmp_path: Path, every: int, story: list[World]
) -> None:
    def made(name: str) -> Town:
        folder = tmp_path / name
        folder.mkdir()
        return make_town(folder=folder)

    whole = made("whole")
    tell(whole, story)
    step, was_killed = every, True
    while was_killed:
        town = made(f"step{step}")
        was_killed = killed_at(step, town.pipeline.folder.parent, lambda town=town: tell(town, story))
        tell(town, story)
        assert town.state() == whole.state()
        assert state_of(town.pipeline.registry) == state_of(whole.pipeline.registry)
        town.pipeline.registry.verify()
        shutil.rmtree(tmp_path / f"step{step}")
        step += every
    assert step > 3 * every, "there were kills"


def tell(town: Town, story: list[World]) -> None:
    """Tell a story from where it stopped."""
    for number, world in enumerate(story, 1):
        while (state := town.state()).looks < number or (state.looks == number and state.step != "watch"):
            town.look(world)
