"""Withdrawals that reach a run: the signed record of a site, whatever it was sent in answer to, is kept."""

import hashlib
from dataclasses import replace
from pathlib import Path

from fedllm.errors import IntegrityError
from fedllm.files import write_bytes
from fedllm.runs.folder import WITHDRAWALS
from fedllm.wire.refusals import read_withdrawn
from fedllm.withdrawal import read_withdrawal
from strategies.exchange.causes import names
from strategies.grid.transport import Reply, Sent
from strategies.session import Watch


def keeping_withdrawals(folder: Path, watch: Watch) -> Watch:
    """Return a watch that keeps every withdrawal it hears of in the run's folder, once, and says so."""

    def heard(sent: Sent, reply: Reply) -> None:
        record = b"" if reply.content is None else read_withdrawn(reply.content)
        if record:
            _keep(folder / WITHDRAWALS, record, reply.node_id, watch)
        watch.reply(sent, reply)

    return replace(watch, reply=heard)


def _keep(folder: Path, record: bytes, node: int, watch: Watch) -> None:
    file = folder / f"{hashlib.sha256(record).hexdigest()[:16]}.json"
    try:
        found = read_withdrawal(record)
        if file.exists():
            return
        write_bytes(file, record)
    except IntegrityError as error:
        watch.notice(f"node {node} has sent {error}; it is not kept")
    except OSError as error:  # the run goes on without the site all the same
        watch.notice(f"{file}: cannot be written ({error.strerror}); ask the site for its withdrawal")
    else:
        whom = names(found.clients) or "all of its clients"
        watch.notice(
            f"a site has withdrawn {whom} (signed {found.site}): `fedllm registry withdraw REGISTRY"
            f" {folder.parent}` marks what was made with their rows"
        )
