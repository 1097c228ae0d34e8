"""The methods of secret sums at a node: how each answers a train request, and what opens its sum."""

from collections.abc import Callable, Mapping

from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.encrypted import answer_decrypt, train_encrypted
from clients.masks import answer_unmask, train_masked
from clients.own_adapter import from_own_adapter
from clients.shared import answer_relay, train_shared
from fedllm.messages import EvaluateRequest, TrainRequest

TRAIN_SECRETLY: Mapping[str, Callable[[DataHolder, TrainRequest, RecordDict], RecordDict]] = {
    "masks": train_masked,
    "he": train_encrypted,
    "shares": train_shared,
}
OPEN_SUM: Mapping[str, Callable[[DataHolder, RecordDict], RecordDict]] = {
    "masks": answer_unmask,
    "he": answer_decrypt,
    "shares": answer_relay,
}


def with_run_adapter(holder: DataHolder, request: EvaluateRequest) -> EvaluateRequest:
    """Return a request about the run's adapter, which a blind server has not to send.

    Raises:
        NotHeldError: its clients have not the adapter of that round either.
    """
    secure = holder.plan.secure
    if secure is not None and secure.is_blind:
        return from_own_adapter(holder, request, request.round_num)
    return request
