"""What may leave a node, by question: read off the writers of its answers, so that there is no second list.

Each answer is written once with made-up values and its records and columns are named. A field that is not
here does not travel: readers refuse any other, and no writer takes free text.
"""

from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict

from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix
from fedllm.messages import ClientAtHome, ClientEvaluation, ClientFailure, ClientUpdate, JoinedClient
from fedllm.originality.overlap import Overlap
from fedllm.secure.masking import Masked
from fedllm.wire import encrypted, joining, masks, overlaps, refusals, replies, shared, stock

_LAYOUT = AdapterLayout((LoraMatrix("a", 1, 1),), 1, 1.0, "0" * 64)


def fields_that_leave(*, in_plain: bool = True) -> Mapping[str, tuple[str, ...]]:
    """Return for every kind of question the fields of its answers, each as "record.field".

    A record of packets has an entry for each client, which is written "record.CLIENT". `in_plain` says that
    updates may leave otherwise than in secret sums.
    """
    delta = torch.zeros(_LAYOUT.size)
    measured = ClientEvaluation(client_id="CLIENT", loss=0.0, num_tokens=1, num_rows=1)
    at_home = ClientAtHome(client_id="CLIENT", alone=0.0, shared=0.0, home=0.0, steps=1)
    update = ClientUpdate(
        client_id="CLIENT",
        round_num=1,
        rank=1,
        delta=delta,
        weight=1.0,
        num_tokens=1,
        train_loss=0.0,
        control_delta=delta,
        held_out=measured,
    )
    packets: Any = {"layout": _LAYOUT, "part": "both", "payload": "fp32"}
    joined = JoinedClient(
        client_id="CLIENT",
        node_id=1,
        num_train=1,
        num_held_out=1,
        fingerprint="",
        run_key=b"KEY",
        public_key=b"KEY",
        commitment="SALTED",
        consent=b"SIGNATURE",
    )
    failed = ClientFailure(client_id="CLIENT", code="failed")
    state = AdapterState(_LAYOUT, delta)
    updates = [
        replies.write_updates([update, failed], **packets, with_held_out=True),
        replies.write_sum([update], delta, **packets, with_held_out=True),
    ]
    stock_updates = [stock.write_plain_update(state, 1, 0.0)]
    answers = {
        "join": [joining.write_joined([joined], joining.Proof("KEY", b""))],
        "train": [
            *(updates if in_plain else ()),
            masks.write_masked([update], {"CLIENT": Masked(b"", (), ())}),
            encrypted.write_encrypted([update], {"CLIENT": b""}),
            shared.write_shared([update], {"CLIENT": (b"", b"", b"")}),
        ],
        "evaluate": [replies.write_evaluations([measured])],
        "adapt": [replies.write_at_home([at_home])],
        "overlap": [overlaps.write_overlaps([Overlap(1, 1, True)])],
        "unmask": [masks.write_openings({"CLIENT": b""})],
        "stock": [*(stock_updates if in_plain else ()), stock.write_plain_evaluation(1, 0.0)],
        "any": [refusals.write_error("failed"), refusals.write_withdrawn(b"RECORD")],
    }
    return {
        kind: tuple(dict.fromkeys(field for content in contents for field in _fields(content)))
        for kind, contents in answers.items()
    }


def _fields(content: RecordDict) -> list[str]:
    return [
        f"{name}.{'TENSOR' if isinstance(record, ArrayRecord) and name == 'arrays' else field}"
        for name, record in content.items()
        for field in record
    ]
