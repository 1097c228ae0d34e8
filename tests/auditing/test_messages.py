"""The message that is attacked is the one that leaves: the run's training, its protection and its codec."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.jobs import make_job
from clients.process import Process
from clients.techniques import plan_node_round
from clients.train import train_clients
from scripts.auditing.control import overfit
from scripts.auditing.inversion import inversion_report
from scripts.auditing.messages import leaving_message, request_of, smallest_client
from scripts.auditing.opening import Case, open_case
from scripts.auditing.secret_messages import secret_messages
from scripts.finished_run import own_rows

CENTRAL = {
    "privacy.epsilon": 8.0,
    "privacy.unit": "client",
    "privacy.clip": 0.01,
    "aggregation.preset": "fedit",
    "aggregation.weighting": "uniform",
}
LOCAL = {**CENTRAL, "privacy.trust": "local"}
EXAMPLE = {"privacy.epsilon": 8.0, "privacy.metrics": "all", "train.batch-size": 6}


@pytest.fixture
def make_case(finished: Callable[..., Path], tmp_path: Path) -> Callable[..., Case]:
    """Return a function (**overrides) -> the plain run, opened as if it had been made with them."""

    def make(overrides: dict[str, Any] | None = None, scratch: str = "state") -> Case:
        folder = tmp_path / scratch
        case = open_case(finished("plain"), max_rows=100, scratch=folder)
        config = case.config.override({"wire.codec": "fp32", **(overrides or {})})
        node = {"server-paths": True, "state-path": str(folder)}
        return replace(case, config=config, holder=Process().open(own_rows(config).to_flat(), node))

    return make


def test_without_protection_it_is_the_change_that_training_gives(make_case: Callable) -> None:
    case = make_case()
    message, request = leaving_message(case), request_of(case)
    (name,) = message.clients
    this_round, client = plan_node_round(case.holder, request), case.holder.clients[name]
    start_P = request.adapter.vector
    job = make_job(this_round, client, 0, rank=request.ranks[name], start_P=start_P)
    (result,) = case.holder.engine.train([job])
    assert torch.equal(message.vectors["update"], result.delta.float())
    assert message.rows == tuple(row for batch in job.batches for row in batch)


def test_the_codec_of_the_run_is_on_it(make_case: Callable) -> None:
    whole, short = (leaving_message(make_case({"wire.codec": codec})) for codec in ("fp32", "bf16"))
    expected = whole.vectors["update"].bfloat16().float()
    assert torch.equal(short.vectors["update"], expected)


def test_under_central_privacy_it_is_clipped(make_case: Callable) -> None:
    message = leaving_message(make_case(CENTRAL))
    norm = float(message.vectors["update"].norm())
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_local_privacys_noise_is_another_one_for_every_audit(make_case: Callable) -> None:
    first, second = (leaving_message(make_case(LOCAL, scratch)) for scratch in "ab")
    gap = first.vectors["update"] - second.vectors["update"]
    assert float(gap.norm()) > 1  # the clip is 0.01: all of it is noise


def test_under_dp_sgd_its_rows_are_those_that_the_coins_drew(make_case: Callable) -> None:
    case = make_case(EXAMPLE)
    message = leaving_message(case)
    (update,) = train_clients(case.holder, request_of(case))  # the same request has the same coins
    assert update.num_tokens == sum(len(row.tokens) for row in message.rows) > 0
    assert torch.equal(update.delta, message.vectors["update"])
    assert message.part == "b"


def test_with_one_sum_a_node_it_is_the_sum_over_all_clients(make_case: Callable) -> None:
    message = leaving_message(make_case({"wire.node-sum": True, "aggregation.read-out": "factor-mean"}))
    assert message.clients == ("anna", "ben")
    assert len(message.rows) == 2 * 2 * 2


def test_a_change_of_a_control_variate_is_a_message_too(make_case: Callable) -> None:
    overrides = {"train.control-variates": True, "aggregation.read-out": "factor-mean"}
    message = leaving_message(make_case(overrides))
    assert set(message.vectors) == {"update", "control variate"}
    assert bool(message.vectors["control variate"].any())


def test_round_that_trains_a_is_attacked(make_case: Callable) -> None:
    assert leaving_message(make_case({"aggregation.preset": "rolora"})).part == "a"
    assert leaving_message(make_case({"aggregation.preset": "ffa"})).part == "b"


def test_clients_of_smaller_rank_send_less(make_case: Callable) -> None:
    message = leaving_message(make_case({"lora.client-ranks": "anna:2,ben:4"}))
    assert message.layout.rank == 2
    assert message.vectors["update"].shape == (message.layout.size,) == message.start.shape


def test_under_masks_one_message_says_nothing(make_case: Callable) -> None:
    """Tokens are read from it as by chance, where the same message in plain gives them away."""
    keys = {"federation.num-clients": 3, "data.partition": "iid"}
    case = make_case({**keys, "secure.method": "masks"})
    learnt, single = secret_messages(case)
    assert len(learnt.clients) == 3
    assert learnt.part == "a"
    assert single.clients == (smallest_client(case.holder),)
    report = inversion_report(case, overfit(case, 1))
    control = report["positive_control"]
    assert set(report["run"]) == {"update", "one message, masked", "one message, in plain"}
    for guess in ("closest", "spanned"):
        assert control[guess]["f1"] == 1
        # 13 guesses of which 4 % are right by chance: seven are once in 10^7 audits.
        assert control["masked"][guess]["f1"] < 0.5
    # What the server learns is the mean of all, as it is without masks.
    summed = {**keys, "wire.node-sum": True, "aggregation.preset": "rolora"}
    mean = leaving_message(make_case(summed, "other")).vectors["update"]
    torch.testing.assert_close(learnt.vectors["update"], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_what_a_server_learns_has_the_noise_of_the_run(make_case: Callable, trust: str) -> None:
    """The audit reads the sum at the scale in which clients have noised it."""
    private = {"privacy.epsilon": 1e3, "privacy.unit": "client", "privacy.trust": trust, "privacy.delta": 0.1}
    keys = {"federation.num-clients": 3, "data.partition": "iid", "secure.method": "masks"}
    case = make_case({**keys, **private, "privacy.noise-multiplier": 1.0, "privacy.clip": 1.0})
    learnt, _ = secret_messages(case)
    found = learnt.vectors["update"]
    moved = found[found != 0]
    noise = case.holder.plan.shared_noise(num_values=len(moved), num_parties=3)
    of_one = noise.step * math.sqrt(noise.variance) if noise else 1.0
    assert float(moved.std()) == pytest.approx(of_one / math.sqrt(3), rel=0.1)
