"""Stock Flower strategies drive our ClientApp, and Flower's stock loop drives our strategy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedTrimmedAvg, MultiKrum, Strategy

from clients.client_app import app
from fedllm.adapters.layout import AdapterState, initial_adapter
from fedllm.errors import ConfigError, RunFailedError
from fedllm.models.base import describe_layout
from fedllm.plan.run_plan import resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.wire.stock import read_plain, write_plain
from scripts.runtimes.local import local_grid
from strategies.flower_strategy import FederatedLora
from strategies.rounds import next_round
from strategies.start import open_session

EVERYBODY = {"min_available_nodes": 4, "min_train_nodes": 4, "min_evaluate_nodes": 4}


def start_of(config: Any) -> AdapterState:
    return initial_adapter(describe_layout(config.model, config.lora), config.seed)


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian, FedAdam])  # the last answers in float64
def test_a_stock_strategy_trains_our_clients(strategy: type[Strategy], make_config: Callable) -> None:
    config = make_config()
    start = start_of(config)
    grid = local_grid(config, app, num_nodes=4)
    result = strategy(**EVERYBODY).start(grid, write_plain(start), num_rounds=2)
    assert read_plain(result.arrays, start.layout).digest != start.digest
    losses = [result.train_metrics_clientapp[number]["train-loss"] for number in (1, 2)]
    held_out = [result.evaluate_metrics_clientapp[number]["eval-loss"] for number in (1, 2)]
    assert losses[0] == pytest.approx(5.9, abs=0.2)  # about log(359), the tiny model's vocabulary
    assert all(0 < loss < 50 for loss in [*losses, *held_out])


@pytest.mark.parametrize(("num_nodes", "train"), [(4, "both"), (2, "both"), (2, "alternate")])
def test_stock_fedavg_and_our_factor_mean_give_the_same_adapter(
    num_nodes: int, train: str, make_config: Callable, open_run: Callable
) -> None:
    means = {"aggregation.read-out": "factor-mean", "aggregation.train": train, "wire.codec": "fp32"}
    config = make_config(means)
    run = open_run(config)
    state = run.state
    for _ in range(2):
        state, _ = next_round(run.session, state)
    options = dict.fromkeys(EVERYBODY, num_nodes)
    grid = local_grid(config, app, num_nodes=num_nodes)  # with 2 nodes each answers for two clients
    result = FedAvg(**options).start(grid, write_plain(start_of(config)), num_rounds=2)
    theirs = read_plain(result.arrays, state.adapter.layout)
    assert float((state.adapter.vector - start_of(config).vector).abs().max()) > 0.01
    torch.testing.assert_close(theirs.vector, state.adapter.vector, rtol=0, atol=1e-6)


def test_a_stock_request_of_another_adapter_gets_a_code_alone(make_config: Callable) -> None:
    config = make_config()
    record = write_plain(start_of(config))
    record["xyzzy"] = record.pop(next(iter(record)))
    replies: list[Message] = []
    grid = local_grid(config, app, num_nodes=4)
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [replies.append(reply) or reply for reply in pull(ids)]
    FedAvg(**EVERYBODY).start(grid, record, num_rounds=1)
    assert len(replies) == 8
    assert {reply.error.reason for reply in replies} == {"bad-packet"}


MEANS = {"aggregation.read-out": "factor-mean", "wire.codec": "int8"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        pytest.param(MEANS, marks=pytest.mark.soak),
        pytest.param({**MEANS, "aggregation.train": "b"}, marks=pytest.mark.soak),
        {**MEANS, "wire.node-sum": True},
    ],
)
def test_flowers_loop_and_our_own_give_the_same_bits(
    overrides: dict[str, Any], make_config: Callable, tmp_path: Any
) -> None:
    config = make_config({"federation.num-rounds": 2, "run.output": str(tmp_path), **overrides})
    ours = FederatedLora(config).start(local_grid(config, app, num_nodes=4))
    strategy = FederatedLora(config)
    grid = local_grid(config, app, num_nodes=4)
    theirs = Strategy.start(strategy, grid, initial_arrays=write_plain(start_of(config)), num_rounds=2)
    layout = start_of(config).layout
    assert read_plain(theirs.arrays, layout).digest == read_plain(ours.arrays, layout).digest
    for number in (1, 2):
        for name in ("train-loss", "num-clients", "num-tokens", "rho", "kept-energy"):
            assert theirs.train_metrics_clientapp[number][name] == ours.train_metrics_clientapp[number][name]
    assert theirs.evaluate_metrics_clientapp[2] == ours.evaluate_metrics_clientapp[2]


def test_our_loop_starts_from_the_arrays_it_is_given(make_config: Callable, tmp_path: Any) -> None:
    config = make_config({"federation.num-rounds": 1, "run.output": str(tmp_path)})
    start = start_of(config)
    other = AdapterState(start.layout, start.vector + 0.1)
    seen = []

    def evaluate_fn(round_num: int, arrays: Any) -> None:
        seen.append((round_num, read_plain(arrays, start.layout).digest))

    digests = []
    for name, arrays in (("a", None), ("b", write_plain(start)), ("c", write_plain(other))):
        named = config.override({"run.name": name})
        grid = local_grid(named, app, num_nodes=4)
        result = FederatedLora(named).start(grid, arrays, evaluate_fn=evaluate_fn)
        digests.append(read_plain(result.arrays, start.layout).digest)
    assert digests[0] == digests[1] != digests[2]
    assert seen == [(1, digest) for digest in digests]


def test_a_number_of_rounds_nodes_compute_with_is_refused(make_config: Callable) -> None:
    config = make_config({"federation.num-rounds": 3, "train.schedule": "cosine"})
    with pytest.raises(ConfigError, match=r"federation\.num-rounds = 2: .* 3") as caught:
        FederatedLora(config).start(local_grid(config, app), num_rounds=2)
    assert "\n" not in str(caught.value)


# --- a stock strategy as our rule --------------------------------------------------------------------------


RULES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.25),
    "MultiKrum": lambda: MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2),
    "FedAdam": lambda: FedAdam(eta=1e-3),
}


def opened(config: Any, stock: Strategy) -> Any:
    session = open_session(resolve(config), local_grid(config, app, num_nodes=4), stock=stock)
    return session, ServerState(0, start_of(config))


@pytest.mark.parametrize("name", RULES)
def test_a_stock_strategy_is_the_rule_of_our_own_loop(name: str, make_config: Callable) -> None:
    """Two rounds of our loop give the adapter that Flower's own loop gives."""
    config = make_config({"aggregation.read-out": "factor-mean", "wire.codec": "fp32"})
    session, state = opened(config, RULES[name]())
    for _ in range(2):
        state, record = next_round(session, state)
    assert record.applied
    assert (record.aggregation.rho, record.aggregation.kept_energy) == (None, None)
    theirs = RULES[name]()
    for key, value in EVERYBODY.items():
        setattr(theirs, key, value)
    result = theirs.start(local_grid(config, app, num_nodes=4), write_plain(start_of(config)), num_rounds=2)
    found = read_plain(result.arrays, state.adapter.layout)
    assert float((state.adapter.vector - start_of(config).vector).abs().max()) > 1e-4
    torch.testing.assert_close(found.vector, state.adapter.vector, rtol=0, atol=2e-6)


def test_stock_fedavg_as_the_rule_is_our_factor_mean(make_config: Callable, open_run: Callable) -> None:
    config = make_config({"aggregation.read-out": "factor-mean"})
    session, state = opened(config, FedAvg())
    found, _ = next_round(session, state)
    run = open_run(config)
    expected, _ = next_round(run.session, run.state)
    torch.testing.assert_close(found.adapter.vector, expected.adapter.vector, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({}, "aggregation.read-out = 'svd'"),
        ({"aggregation.preset": "fedex"}, "aggregation.preset = 'fedex'"),
        ({"aggregation.preset": "hetlora"}, "aggregation.preset = 'hetlora'"),
        ({"aggregation.read-out": "factor-mean", "aggregation.robust": "multi-krum"}, "aggregation.robust"),
        (
            {"aggregation.read-out": "factor-mean", "aggregation.optimizer": "fedadam"},
            "aggregation.optimizer",
        ),
        (
            {"aggregation.read-out": "factor-mean", "aggregation.optimizer": "fedavg:learning-rate=0.5"},
            "aggregation.optimizer",
        ),
        ({"aggregation.read-out": "factor-mean", "wire.node-sum": True}, "wire.node-sum"),
        (
            {"aggregation.read-out": "factor-mean", "aggregation.train": "b", "lora.client-ranks": "1,2"},
            "lora.client-ranks",
        ),
        ({"privacy.epsilon": 8.0, "privacy.unit": "client"}, "privacy.trust = 'central'"),
    ],
)
def test_a_rule_with_a_stock_strategy_is_refused(
    overrides: dict[str, Any], key: str, make_config: Callable
) -> None:
    with pytest.raises(ConfigError, match="a stock Flower strategy") as caught:
        opened(make_config(overrides), FedAvg())
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stock_strategy_that_gives_nothing_stops_the_run(make_config: Callable) -> None:
    class Silent(FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return None, None

    session, state = opened(make_config({"aggregation.read-out": "factor-mean"}), Silent())
    with pytest.raises(RunFailedError, match="round 1: Silent gave no adapter"):
        next_round(session, state)
