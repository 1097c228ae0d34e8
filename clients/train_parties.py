"""A node's clients train for secret sums: the run's method hides each party's words before they leave."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from clients.data_holder import DataHolder
from clients.parties import OwnParty, party_words
from clients.technique import failure_of
from clients.train import train_clients
from fedllm.errors import CheckpointError, SecureError
from fedllm.messages import ClientFailure, ClientUpdate, TrainRequest

T = TypeVar("T")


def train_parties(
    holder: DataHolder,
    request: TrainRequest,
    parties: Sequence[OwnParty],
    hide: Callable[[OwnParty, np.ndarray], T],
) -> tuple[list[ClientUpdate | ClientFailure], dict[str, T]]:
    """Return an answer for each client of a request, and by party what `hide` makes of its words (uint32).

    A party whose words cannot be hidden, or were others before under the same label, has failed.
    """
    labels = {client: party.asked.exchange.label for party in parties for client in party.clients}
    answers = {answer.client_id: answer for answer in train_clients(holder, request, labels=labels)}
    hidden: dict[str, T] = {}
    for party in parties:
        found = [answers[name] for name in party.clients]
        updates = [answer for answer in found if isinstance(answer, ClientUpdate)]
        if not updates:
            continue
        try:
            hidden[party.name] = hide(party, party_words(holder, request, party, updates))
        except (SecureError, CheckpointError) as error:
            answers |= {each.client_id: failure_of(each.client_id, error) for each in updates}
    return list(answers.values()), hidden
