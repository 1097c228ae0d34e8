"""A client's half of `secure.method = masks`: what leaves is masked, and later shares of masks for the sum.

Both answers are in the ledger of their label before they leave (`clients.run_keys`). The protocol itself is
in `fedllm.secure.masking`.
"""

import numpy as np
from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.parties import OwnParty, forget_keys, kept_exchange, own_keys, own_parties
from clients.technique import failure_of
from clients.train_parties import train_parties
from fedllm.errors import CheckpointError, SecureError
from fedllm.messages import ClientFailure, TrainRequest
from fedllm.secure.masking import Masked, mask, opening
from fedllm.wire.masks import Unmasking, read_sums, read_unmask, write_masked, write_openings


def train_masked(holder: DataHolder, request: TrainRequest, content: RecordDict) -> RecordDict:
    """Return the answer to a train request: for each party a masked vector, and no number of its clients.

    Raises:
        BadPartiesError, TooFewPartiesError: a client might not be hidden in the sum; nothing is trained.
    """
    parties = own_parties(holder, request, read_sums(content))
    return write_masked(*train_parties(holder, request, parties, _mask))


def _mask(party: OwnParty, words: np.ndarray) -> Masked:
    return mask(party.name, party.keys.private, party.asked.exchange, words, party.keys.secret)


def answer_unmask(holder: DataHolder, content: RecordDict) -> RecordDict:
    """Return each asked party's shares of the masks that are left in a sum; or end the run's keys.

    Raises:
        OtherConfigError: the question is of another run.
    """
    unmaskings = read_unmask(content, holder.plan.digest)
    if not unmaskings:  # the run is over
        forget_keys(holder)
    openings: dict[str, bytes | ClientFailure] = {}
    for unmasking in unmaskings:
        for name in unmasking.boxes:
            try:
                openings[name] = _open(holder, name, unmasking)
            except (SecureError, CheckpointError) as error:
                openings[name] = failure_of(name, error)
    return write_openings(openings)


def _open(holder: DataHolder, name: str, unmasking: Unmasking) -> bytes:
    keys = own_keys(holder, name)
    shares = opening(
        name,
        keys.private,
        kept_exchange(keys, unmasking.label),
        unmasking.answered,
        dict(zip(unmasking.answered, unmasking.boxes[name], strict=True)),
        dict(zip(unmasking.answered, unmasking.commitments[name], strict=True)),
    )
    keys.note(unmasking.label, "opened", {"answered": sorted(unmasking.answered)})
    return shares
