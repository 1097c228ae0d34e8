"""Training at home: it chooses by rows that measure nothing, and gives what training alone so long gives."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from clients.at_home import AtHome, can_choose, split_held_out, step_counts, train_at_home
from clients.tokens import ClientTokens
from fedllm.adapters.layout import initial_adapter
from fedllm.config.keys import LoraConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.messages import LocalTraining
from fedllm.models.base import BaseModel, layout_of
from fedllm.models.chat import Encoded

TRAINING = LocalTraining(steps=1, batch_size=2, learning_rate=2e-2, weight_decay=0.0, clip_norm=1.0)
COUNTS = {"anna": step_counts(8), "ben": step_counts(4)}


def row(*numbers: int) -> Encoded:
    return Encoded(numbers, (-100, *numbers[1:]))


def client(name: str, shift: int) -> ClientTokens:
    """Return a client whose rows count upwards, each from another number; one held-out row is there twice."""
    rows = [row(*range(begin + shift, begin + shift + 8)) for begin in range(30)]
    held_out = rows[::3]
    return ClientTokens(name, tuple(rows[1::3] + rows[2::3]), (*held_out, held_out[0]))


@pytest.fixture
def engine(load_tiny: Callable[..., BaseModel]) -> Engine:
    base = load_tiny("llama", "float64")
    return Engine(base, layout_of(base.model, LoraConfig(rank=2, alpha=4.0), base.fingerprint))


@pytest.fixture
def clients() -> dict[str, ClientTokens]:
    return {"anna": client("anna", 10), "ben": client("ben", 200)}


@pytest.fixture
def trained(engine: Engine, clients: dict[str, ClientTokens]) -> Callable[..., dict[str, AtHome]]:
    """Return a function (**arguments) -> what clients have after training by themselves."""
    start = initial_adapter(engine.layout, 0).vector

    def train(**arguments: object) -> dict[str, AtHome]:
        given = {"clients": clients, "counts": COUNTS, "training": TRAINING, "seed": 3, **arguments}
        starts = dict.fromkeys(clients, start)
        return train_at_home(engine, engine.layout, starts=starts, **given)  # type: ignore[arg-type]

    return train


def test_halves_do_not_depend_on_order_and_part_no_copies() -> None:
    rows = client("anna", 10).held_out
    choosing, measuring = split_held_out(rows)
    assert not {*choosing} & {*measuring}
    assert sorted([*choosing, *measuring], key=hash) == sorted(rows, key=hash)
    assert [set(half) for half in split_held_out(rows[::-1])] == [set(choosing), set(measuring)]
    assert split_held_out(rows[:1]) == (rows[:1], rows[:1])


def test_the_loss_that_chose_is_the_lowest_and_measures_nothing(
    engine: Engine, clients: dict[str, ClientTokens], trained: Callable
) -> None:
    found = trained()
    assert {name: tuple(one.choosing) for name, one in found.items()} == {
        "anna": (0, 1, 2, 4, 6, 8),
        "ben": (0, 1, 2, 3, 4),
    }
    for name, one in found.items():
        choosing, measuring = split_held_out(clients[name].held_out)
        assert one.choosing[one.steps] == min(one.choosing.values())
        for rows, loss in ((choosing, one.choosing[one.steps]), (measuring, one.loss)):
            (answer,) = engine.evaluate([EvaluationJob(name, one.vector, rows)])
            assert answer.loss == pytest.approx(loss, abs=1e-9)
        assert one.steps > 0
        assert one.loss < one.measured[0]


def test_a_chosen_adapter_is_that_of_training_so_many_steps(
    engine: Engine, clients: dict[str, ClientTokens], trained: Callable
) -> None:
    (anna,) = trained(clients={"anna": clients["anna"]}).values()
    again = trained(clients={"anna": clients["anna"]}, counts={"anna": [anna.steps]})["anna"]
    torch.testing.assert_close(again.vector, anna.vector)
    assert again.choosing[anna.steps] == pytest.approx(anna.choosing[anna.steps])


def test_rows_go_on_from_those_drawn_before(trained: Callable) -> None:
    first, later = trained(), trained(drawn={"anna": 4, "ben": 0})
    assert not torch.equal(first["anna"].vector, later["anna"].vector)
    assert torch.allclose(first["ben"].vector, later["ben"].vector)


def test_training_that_harms_leaves_the_start(engine: Engine, trained: Callable) -> None:
    found = trained(training=replace(TRAINING, learning_rate=1e30))
    start = initial_adapter(engine.layout, 0).vector
    for one in found.values():
        assert one.steps == 0
        assert torch.equal(one.vector, start)
        assert one.loss == one.measured[0]


def test_who_has_too_few_held_out_rows_is_left_out(
    clients: dict[str, ClientTokens], trained: Callable
) -> None:
    ben = replace(clients["ben"], held_out=clients["ben"].held_out[:1])
    assert not can_choose(ben)
    assert list(trained(clients={"anna": clients["anna"], "ben": ben})) == ["anna"]


def test_counts_rise_from_none_to_the_most() -> None:
    assert step_counts(1) == (0, 1)
    assert step_counts(80) == (0, 10, 20, 40, 60, 80)
