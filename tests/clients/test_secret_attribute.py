"""A hostile server asks for one secret of each of 20 rows: it learns all of them, or under [budget] none."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.process import Process
from clients.site import data_budget
from clients.techniques import plan_node_round
from clients.train import prepare_clients, train_clients
from fedllm.engine.jobs import EvaluationJob
from fedllm.errors import PolicyError
from fedllm.messages import ClientEvaluation, ClientFailure, ClientUpdate
from fedllm.models.chat import Encoded
from fedllm.privacy.data_budget import spent
from tests.builders import evaluate_request, train_request

NUM_ROWS = 20
WORDS = ("healthy", "ill")
SECRETS = tuple(random.Random(4).randrange(2) for _ in range(NUM_ROWS))
RUN = {"train.local-steps": 1, "train.batch-size": 1, "aggregation.preset": "ffa"}
PRIVATE = {"privacy.epsilon": 0.3, "privacy.metrics": "withheld", "federation.num-rounds": 1}
LIMIT = 1.0


@pytest.fixture
def ask(make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DataHolder]:
    """Return a function (number, limit, **flat) -> a node in the run of a server's next question.

    The run's seed is the server's, and chooses the row. With a limit the node has a site.toml.
    """
    process, file = Process(), tmp_path / "own.jsonl"
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "split-secret").write_bytes(bytes(32))  # else of the system's: no two tests alike

    def do(number: int, limit: float = 0.0, rows: Any = None, **flat: Any) -> DataHolder:
        lines = rows or enumerate(SECRETS)
        texts = ({"instruction": f"patient {who}?", "output": WORDS[secret]} for who, secret in lines)
        file.write_text("".join(json.dumps(text) + "\n" for text in texts))
        (tmp_path / "site.toml").write_text(f'site.state-path = "state"\nbudget.epsilon = {limit}')
        monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml") if limit else "")
        own = {"data-path": str(file), "client-id": "anna", "server-paths": True}
        config = make_config(**{**RUN, "run.name": f"run{number}", "seed": number, **flat})
        return process.open(config.to_flat(), {**own, "state-path": str(tmp_path / "state")})

    return do


@pytest.fixture
def imagined(ask: Callable) -> tuple[Encoded, ...]:
    """The rows as a server imagines them: of each patient one that is healthy, then one that is ill."""
    both = [(who, secret) for who in range(NUM_ROWS) for secret in (0, 1)]
    rows: tuple[Encoded, ...] = ask(0, rows=both, **{"data.held-out-fraction": 0.0}).clients["anna"].train
    return rows


def patient(row: Encoded, imagined: tuple[Encoded, ...]) -> int:
    """Return whose row it is; a server knows which one its own seed has chosen."""
    return [one.tokens for one in imagined].index(row.tokens) // 2


def change(holder: DataHolder, row: Encoded) -> torch.Tensor:
    """Return the update that a server computes itself for a row."""
    (work,) = prepare_clients(plan_node_round(holder, train_request(holder, "anna")), {"anna": 0})
    plain = replace(work.job, batches=((row,),), noise=None, example_clip=0.0)
    (result,) = holder.engine.train([plain])
    return result.delta.float()


def guess(holder: DataHolder, update: ClientUpdate, pair: tuple[Encoded, ...]) -> int:
    """Return the secret whose update is nearer to the one that came."""
    distances = [float((update.delta - change(holder, row)).norm()) for row in pair]
    return distances.index(min(distances))


def test_losses_tell_every_secret_and_a_budget_withholds_them(
    ask: Callable, imagined: tuple[Encoded, ...]
) -> None:
    seen = {}
    for number in range(20):
        holder = ask(number, **{"data.max-held-out": 1})
        (measured,) = holder.clients["anna"].held_out
        (answer,) = evaluate_clients(holder, evaluate_request(holder, "anna"))
        assert isinstance(answer, ClientEvaluation)
        who = patient(measured, imagined)
        start_P = evaluate_request(holder, "anna").adapter.vector
        own = [
            holder.engine.evaluate([EvaluationJob("x", start_P, (row,))])[0].loss
            for row in imagined[2 * who : 2 * who + 2]
        ]
        seen[who] = int(abs(own[1] - answer.loss) < abs(own[0] - answer.loss))
    assert len(seen) >= NUM_ROWS / 2
    assert all(SECRETS[who] == secret for who, secret in seen.items())
    with pytest.raises(PolicyError, match="the run has none"):
        ask(0, LIMIT, **{"data.max-held-out": 1})
    with pytest.raises(PolicyError, match=r"privacy\.metrics = 'held-out'"):
        ask(0, LIMIT, **{**PRIVATE, "privacy.metrics": "held-out"})


@pytest.mark.parametrize(("limit", "flat"), [pytest.param(0.0, {}, marks=pytest.mark.soak), (LIMIT, PRIVATE)])
def test_updates_of_one_row_tell_its_secret_or_nothing(
    limit: float, flat: dict[str, Any], ask: Callable, imagined: tuple[Encoded, ...]
) -> None:
    """One row a run, 20 runs: each further answer is charged, until the data's budget ends them all."""
    coins, right, told, answers = random.Random(7), 0, [0.0], 0
    for number in range(NUM_ROWS):
        holder = ask(number, limit, **{"data.max-rows": 1, "data.held-out-fraction": 0.0}, **flat)
        holder.store.folder.mkdir(parents=True)
        (holder.store.folder / "noise-secret").write_bytes(bytes([number]) * 32)
        (row,) = holder.clients["anna"].train
        who = patient(row, imagined)
        (answer,) = train_clients(holder, train_request(holder, "anna"))
        if isinstance(answer, ClientUpdate):
            answers += 1
            right += guess(holder, answer, imagined[2 * who : 2 * who + 2]) == SECRETS[who]
        else:
            assert answer == ClientFailure(client_id="anna", code="budget-spent")
            right += coins.randrange(2) == SECRETS[who]
        budget = data_budget(holder.data_path, holder.state_path)
        assert budget is not None
        told.append(spent(budget.ledger, "example", 1e-5))
    if not limit:
        assert (right, answers) == (NUM_ROWS, NUM_ROWS)
        return
    # Of 20 fair coins fewer than 4 or more than 16 are right three times in a thousand.
    assert 4 <= right <= 16
    assert 2 < answers < NUM_ROWS
    assert all(low < high for low, high in pairwise(told[: answers + 1]))
    assert told[answers:] == [told[answers]] * (NUM_ROWS + 1 - answers)
    assert told[-1] <= LIMIT
