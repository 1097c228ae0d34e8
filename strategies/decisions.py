"""The log of a run at the server, `decisions.jsonl`: every answer that came, and what was decided on it.

    begun      the run, the digest of its plan, what a program gave it; once more each time that it goes on
    joined     a client, its node and the sizes and base model it declared, at the start or later
    reply      an answer of a node: what was asked, the digest of what it holds, or the code or reason of none
    accepted   a sound update, with its weight and the digest of its delta; the attempt's `round` line says
               whether it was applied
    refused    one that does not, and why
    round      what a round made: the digest of the adapter after it
    checkpoint the round and the adapter that a resumed run goes on from
    published  the SHA-256 of the weights file of the adapter that is published
    failed     why the run ended instead
    notice     any other line that the server said

Lines are chained by hash (`fedllm.chained_log`). A node's own log has the same digests of its answers, so
that both can be compared. Of clients there are ids, numbers and codes, never text.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.adapters.folder import WEIGHTS
from fedllm.chained_log import append
from fedllm.errors import CheckpointError, FedLLMError
from fedllm.files import MANIFEST
from fedllm.messages import ClientFailure, ClientUpdate, JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.folder import DECISIONS
from fedllm.runs.records import RoundRecord
from fedllm.wire.digests import content_digest
from fedllm.wire.refusals import read_error
from strategies.grid.transport import Reply, Sent
from strategies.session import Watch


@contextmanager
def decided(folder: Path, plan: RunPlan, watch: Watch, given: Sequence[str] = ()) -> Iterator[Watch]:
    """Yield `watch` with ears that write the log of the run in `folder`; what it ends with is written too.

    `given` names what the caller put in place of what the run's folder and configuration say.
    A disk that is full for a while loses no line: all that could not be written comes with the next.

    Raises:
        CheckpointError: lines could still not be written when the run is over.
    """
    log = Decisions(folder / DECISIONS, watch.notice)
    log.note("begun", run=plan.config.run.name, plan=plan.digest, given=list(given))
    try:
        yield log.listening(watch)
    except (FedLLMError, OSError) as error:
        log.note("failed", reason=str(error))
        raise
    digests = json.loads((folder / "adapter" / MANIFEST).read_text())["sha256"]
    log.note("published", weights=digests[WEIGHTS])
    if log.waiting:
        raise CheckpointError(
            f"{log.path}: {len(log.waiting)} lines could not be written; free space, --resume"
        )


@dataclass(eq=False)
class Decisions:
    """The log while its run goes on: `waiting` are entries that could not be written yet."""

    path: Path
    notice: Callable[[str], None]
    waiting: list[Mapping[str, Any]] = field(default_factory=list)

    def note(self, event: str, *, is_flushed: bool = True, **fields: object) -> None:
        """Add an entry; where the disk does not take it, say so once and keep it for the next call."""
        self.waiting.append({"event": event, **fields})
        try:
            append(self.path, *self.waiting, is_flushed=is_flushed)
        except OSError as error:
            if len(self.waiting) == 1:
                self.notice(f"{self.path}: {error.strerror}; going on, later lines bring these along")
        else:
            self.waiting.clear()

    def listening(self, watch: Watch) -> Watch:
        """Return a watch that writes what it hears before it passes it on."""

        def after(write: Callable[..., None], tell: Callable[..., None]) -> Callable[..., None]:
            def both(*heard: Any) -> None:
                write(*heard)
                tell(*heard)

            return both

        return replace(
            watch,
            notice=after(lambda line: self.note("notice", is_flushed=False, text=line), watch.notice),
            joined=after(self._joined, watch.joined),
            joined_later=after(self._joined, watch.joined_later),
            reply=after(self._reply, watch.reply),
            client=after(self._client, watch.client),
            record=after(self._record, watch.record),
            saved=after(self._saved, watch.saved),
        )

    def _joined(self, clients: Mapping[str, JoinedClient]) -> None:
        for client in clients.values():
            self.note(
                "joined",
                is_flushed=False,  # the checkpoints and rounds are: they cover all lines before them
                client=client.client_id,
                node=client.node_id,
                site=client.site,
                num_train=client.num_train,
                num_held_out=client.num_held_out,
                fingerprint=client.fingerprint,
            )

    def _reply(self, sent: Sent, reply: Reply) -> None:
        code = reply.reason if reply.content is None else read_error(reply.content) or "ok"
        digest = "" if reply.content is None else content_digest(reply.content)
        about = {"round": reply.plan.round_num} if reply.plan else {}
        asked = {"node": sent.node, "kind": sent.message_type, **about}
        self.note("reply", is_flushed=False, **asked, code=code, answer=digest)

    def _client(self, round_num: int, result: ClientUpdate | ClientFailure) -> None:
        if isinstance(result, ClientFailure):
            said = {"code": result.code, "reason": result.reason}
            self.note("refused", is_flushed=False, round=round_num, client=result.client_id, **said)
            return
        numbers: dict[str, object] = {"weight": result.weight}
        if result.delta.numel():  # the member of a sum has none of its own
            numbers["delta"] = hashlib.sha256(result.delta.cpu().contiguous().numpy().data).hexdigest()
        self.note("accepted", is_flushed=False, round=round_num, client=result.client_id, **numbers)

    def _record(self, record: RoundRecord) -> None:
        self.note(
            "round",
            round=record.round_num,
            attempt=record.attempt,
            num_asked=len(record.asked),
            num_accepted=len(record.accepted),
            silenced=record.aggregation.silenced,
            applied=record.applied,
            adapter=record.adapter,
        )

    def _saved(self, state: ServerState) -> None:
        self.note("checkpoint", round=state.round_num, adapter=state.adapter.digest)
