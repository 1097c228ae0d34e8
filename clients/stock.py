"""Requests of stock Flower strategies: named PEFT tensors in, named PEFT tensors out.

Such a strategy knows one array record and one `num-examples` a node. So a node that hosts several clients
answers with their weighted mean, as FedAvg over the clients would have computed it.
"""

from flwr.app import Context, RecordDict

from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.protect import node_mean
from clients.techniques import techniques_of
from clients.train import train_clients
from fedllm.adapters.base_delta import no_base_delta
from fedllm.adapters.layout import AdapterState
from fedllm.errors import ConfigError, NoDataError, WireError
from fedllm.messages import ClientEvaluation, ClientUpdate, EvaluateRequest, TrainRequest
from fedllm.wire.stock import read_plain, write_plain_evaluation, write_plain_update


def train_for_stock(holder: DataHolder, content: RecordDict, context: Context | None = None) -> RecordDict:
    """Return the node's new adapter and `num-examples`.

    Raises:
        ConfigError: clients of the run keep vectors between rounds (a personal adapter, say), or their
            updates are summed in secret.
        WireError: the request does not hold exactly one adapter of this run's layout.
        NoDataError: no client of this node has an update.
    """
    if holder.plan.secure is not None:
        raise ConfigError(
            f"secure.method = {holder.plan.secure.method!r}: no client's own update leaves, and a stock"
            " strategy asks for those; use fedllm's own rounds (`fedllm run`)"
        )
    start, round_num = _read_adapter(holder, content), _round_of(content)
    # Kept vectors are found by how often a client took part, and a stock strategy does not count that.
    for technique in techniques_of(holder.plan, start.layout):
        if technique.kept:
            raise ConfigError(
                f"{technique.name}: a stock strategy does not count in which rounds a client took part; use"
                " fedllm's own rounds (`fedllm run`)"
            )
    training = holder.plan.training(round_num)
    drawn = (round_num - 1) * training.steps * training.batch_size  # in every earlier round as many
    request = TrainRequest(
        round_num=round_num,
        drawn=dict.fromkeys(holder.clients, drawn),
        ranks=dict.fromkeys(holder.clients, start.layout.rank),
        adapter=start,
        base_delta=no_base_delta(start.layout),
        plan_digest=holder.plan.digest,
    )
    answers = train_clients(holder, request, weighting="examples")  # as FedAvg weighs its clients
    updates = [answer for answer in answers if isinstance(answer, ClientUpdate)]
    if not updates:
        raise NoDataError("no client of this node has an update")
    total = sum(update.weight for update in updates)
    after = AdapterState(start.layout, start.vector + node_mean(updates))
    loss = sum(update.weight / total * update.train_loss for update in updates)
    return write_plain_update(after, int(total), loss)


def evaluate_for_stock(holder: DataHolder, content: RecordDict, context: Context | None = None) -> RecordDict:
    """Return the node's mean held-out loss per token and `num-examples`; raises as `train_for_stock`."""
    start = _read_adapter(holder, content)
    request = EvaluateRequest(
        round_num=_round_of(content),
        drawn=dict.fromkeys(holder.clients, 0),
        adapter=start,
        base_delta=no_base_delta(start.layout),
        plan_digest=holder.plan.digest,
    )
    done = [answer for answer in evaluate_clients(holder, request) if isinstance(answer, ClientEvaluation)]
    if not done:
        raise NoDataError("no client of this node keeps held-out rows")
    num_rows = sum(answer.num_rows for answer in done)
    loss = sum(answer.loss * answer.num_rows for answer in done) / num_rows
    return write_plain_evaluation(num_rows, loss)


def _read_adapter(holder: DataHolder, content: RecordDict) -> AdapterState:
    arrays = list(content.array_records.values())
    if len(arrays) != 1:  # a strategy may name its record as it likes, so it is known by being alone
        raise WireError(f"a request carries exactly one adapter, not {len(arrays)}")
    return read_plain(arrays[0], holder.engine.layout)


def _round_of(content: RecordDict) -> int:
    for config in content.config_records.values():
        round_num = config.get("server-round")
        if isinstance(round_num, int) and round_num >= 0:
            return max(1, round_num)  # Flower evaluates before round 1 under the number 0
    return 1
