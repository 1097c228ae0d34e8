"""A hostile server for tests: it asks one node whatever it likes, run by run."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from flwr.app import RecordDict

from clients.answering import answer
from clients.data_holder import DataHolder
from clients.gate import Sender
from clients.kinds import make_app
from clients.process import Process
from fedllm.config.run_config import RunConfig
from fedllm.originality.overlap import OverlapRequest, probe
from fedllm.wire import overlaps, refusals, requests
from fedllm.wire.stock import write_plain
from scripts.runtimes.local import local_grid
from tests.builders import evaluate_request, train_request

SALT = bytes(16)
NUM_ROWS = 40


@dataclass(frozen=True, eq=False)
class Hostile:
    """A server that asks one node whatever it likes; each of its runs has a configuration of its own."""

    config: RunConfig
    process: Process
    node: dict[str, Any]
    sender: Sender

    def holder(self) -> DataHolder:
        return self.process.open(self.config.to_flat(), self.node)

    def message(self, kind: str, content: RecordDict) -> RecordDict | str:
        """Return what the node sends as it is, or the reason of Flower's own error."""
        grid = local_grid(self.config, make_app(partial(answer, self.process, sender=self.sender)))
        (node_id,) = grid.get_node_ids()
        grid.contexts[node_id].node_config = self.node
        (reply,) = grid.send_and_receive([grid.create_message(content, kind, node_id, group_id="1")])
        return reply.error.reason if reply.has_error() else reply.content

    def reply(self, kind: str, content: RecordDict) -> RecordDict | str:
        """Return what the node sends, or the code of an error."""
        sent = self.message(kind, content)
        return sent if isinstance(sent, str) else refusals.read_error(sent) or sent

    def join(self) -> Any:
        return self.reply("query.join", RecordDict())

    def train(self, **changes: Any) -> Any:
        request = train_request(self.holder(), "ward", **changes)
        return self.reply("train", requests.write_train_request(request, requests.Sending()))

    def evaluate(self) -> Any:
        request = evaluate_request(self.holder(), "ward")
        return self.reply("evaluate", requests.write_evaluate_request(request, requests.Sending()))

    def adapt(self, **changes: Any) -> Any:
        request = evaluate_request(self.holder(), "ward", **changes)
        return self.reply("query.adapt", requests.write_evaluate_request(request, requests.Sending()))

    def unmask(self) -> Any:
        return self.reply("query.unmask", RecordDict())

    def stock(self, kind: str) -> Any:
        adapter = train_request(self.holder(), "ward").adapter
        return self.reply(kind, RecordDict({"arrays": write_plain(adapter)}))

    def overlap(self, *texts: tuple[int, ...], round_num: int = 1) -> Any:
        probes = tuple(probe(text, SALT) for text in texts or (tuple(range(5, 60)),))
        return self.reply(
            "query.overlap", overlaps.write_overlap_request(OverlapRequest(round_num, SALT, probes))
        )
