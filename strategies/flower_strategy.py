"""The whole server as one Flower strategy: `FederatedLora(config).start(grid, ArrayRecord())`.

`start` runs our own loop (`strategies.run`), because Flower's has no checkpoint, no resume, an hour's
deadline and dies of one bad reply. The four steps of Flower's interface are here as well, made of the same
functions, for code that drives a strategy step by step. The class is final: behaviour comes from
`RunConfig`, never from a subclass.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import final

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedllm.adapters.base_delta import adapter_with_base_delta
from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import check_nodes_agree, check_one_exchange, resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import RoundPlan, RoundRecord
from fedllm.wire.stock import read_plain, write_plain
from strategies.exchange.evaluation import read_evaluations
from strategies.exchange.receiving import read_reply
from strategies.exchange.requesting import begin_round, evaluate_requests
from strategies.grid.transport import reply_of
from strategies.privacy import check_budget
from strategies.rounds import aggregate
from strategies.run import run_federation
from strategies.session import SILENT, Session, Watch
from strategies.start import open_session


@final
class FederatedLora(Strategy):
    """Federated LoRA fine-tuning as `config` describes it; `watch` hears of its progress.

    `stock`, another Flower strategy, takes the place of our own mean of the clients' factors.
    """

    def __init__(self, config: RunConfig, watch: Watch = SILENT, stock: Strategy | None = None):
        self.config = config
        self.watch = watch
        self.stock = stock
        # Opened by the first step that has a grid; `start` opens one of its own.
        self._session: Session | None = None
        self._state: ServerState | None = None
        self._plan: RoundPlan | None = None

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 0,
        timeout: float = 0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation and return Flower's result: named PEFT tensors, and metrics by round.

        `initial_arrays` (named PEFT tensors) replaces the seeded initial adapter; `num_rounds` and `timeout`
        replace `federation.num-rounds` and `federation.round-deadline` where given. The two configs are
        Flower's; every number a client needs comes from `RunConfig` instead.

        Raises:
            ConfigError: nodes compute with the number of rounds (a cosine schedule does), and have another.
            FedLLMError: the run cannot start or go on; the message says why.
        """
        # Flower passes 0 for what the caller left out
        changes = {"federation.num-rounds": num_rounds, "federation.round-deadline": float(timeout)}
        config = self.config.override({key: value for key, value in changes.items() if value})
        check_nodes_agree(config, self.config)
        start = None
        if initial_arrays:
            start = read_plain(initial_arrays, self._open(grid).layout)
        state = run_federation(config, grid, self.watch, start, self.stock)
        result = Result()
        result.arrays = write_plain(adapter_with_base_delta(state.adapter, state.base_delta))
        for record in state.records:
            if record.round_num:
                result.train_metrics_clientapp[record.round_num] = _train_metrics(record)
            if record.held_out:
                result.evaluate_metrics_clientapp[record.round_num] = MetricRecord(
                    {"held-out-loss": record.mean_held_out or 0.0}
                )
        if evaluate_fn is not None:
            metrics = evaluate_fn(state.round_num, result.arrays)
            if metrics is not None:
                result.evaluate_metrics_serverapp[state.round_num] = metrics
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the train messages of a round that starts from `arrays` (named PEFT tensors).

        Raises:
            BudgetSpentError: the round would exceed the privacy budget.
            ConfigError: the run has secret sums, which take more than this step and the next.
        """
        session = self._open(grid)
        check_one_exchange(session.plan)
        before = self._state or ServerState(0, session.initial)
        adapter = read_plain(arrays, session.layout)
        self._state = replace(before, round_num=server_round - 1, adapter=adapter)
        # Flower has no exception for a run that may not go on: ours passes through its loop.
        least = self.config.federation.min_clients
        check_budget(session.privacy, self._state, session.clients, 1, least=least)
        self._plan, contents = begin_round(session, self._state)
        return _messages(contents, "train", server_round)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new adapter as named PEFT tensors, or None where too few updates are sound."""
        session, state, plan = self._session, self._state, self._plan
        if session is None or state is None or plan is None:
            raise RuntimeError("configure_train comes before aggregate_train")
        asked = session.by_node(plan.asked)
        answers = (
            answer
            for reply in map(reply_of, replies)
            for answer in read_reply(session, plan, reply, asked.get(reply.node_id, []))
        )
        after, record = aggregate(session, state, plan, answers)
        if not record.applied:
            self._state = after  # with what the attempt cost under a privacy plan
            return None, None  # Flower keeps its arrays then
        self._state = replace(after, records=(*after.records, record))
        return write_plain(self._state.adapter), _train_metrics(record)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the evaluate messages of a round, for every client with held-out rows."""
        session = self._open(grid)
        before = self._state or ServerState(0, session.initial)
        state = replace(before, round_num=server_round, adapter=read_plain(arrays, session.layout))
        return _messages(evaluate_requests(session, state), "evaluate", server_round)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean held-out loss over clients, or None where none was measured."""
        if self._session is None:
            raise RuntimeError("configure_evaluate comes before aggregate_evaluate")
        hosted = self._session.by_node(self._session.clients)
        losses: dict[str, float] = {}  # NaN where a client's is no finite number, so the mean says so
        for reply in map(reply_of, replies):
            found = read_evaluations(self._session, reply, hosted.get(reply.node_id, []), self.watch.notice)
            losses |= {client: one.loss if one else math.nan for client, one in found.items()}
        return MetricRecord({"held-out-loss": sum(losses.values()) / len(losses)}) if losses else None

    def summary(self) -> None:
        """Tell the watcher what is about to run."""
        config = self.config
        self.watch.notice(
            f"{config.federation.num_rounds} rounds of {config.model.name}, rank {config.lora.rank},"
            f" read-out {resolve(config).aggregation.read_out}, {config.wire.codec} deltas"
        )

    def _open(self, grid: Grid) -> Session:
        if self._session is None:
            self._session = open_session(resolve(self.config), grid, self.watch, self.stock)
        return self._session


def _messages(contents: Mapping[int, RecordDict], kind: str, server_round: int) -> list[Message]:
    return [
        Message(content, dst_node_id=node, message_type=kind, group_id=str(server_round))
        for node, content in contents.items()
    ]


def _train_metrics(record: RoundRecord) -> MetricRecord:
    """Return the numbers of a round under Flower's kebab names."""
    return MetricRecord(  # which holds no None: what was not measured is 0
        {
            "train-loss": record.training.loss or 0.0,
            "num-clients": len(record.accepted),
            "num-tokens": record.training.num_tokens,
            "rho": record.aggregation.rho or 0.0,
            "kept-energy": record.aggregation.kept_energy or 0.0,
        }
    )
