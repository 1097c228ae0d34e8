"""The methods of secret sums at a node: how each answers a train request, and what opens its sum."""

from collections.abc import Callable, Mapping

from flwr.app import RecordDict

from clients.data_holder import DataHolder
from clients.encrypted import answer_decrypt, train_encrypted
from clients.masks import answer_unmask, train_masked
from fedllm.messages import TrainRequest

TRAIN_SECRETLY: Mapping[str, Callable[[DataHolder, TrainRequest, RecordDict], RecordDict]] = {
    "masks": train_masked,
    "he": train_encrypted,
}
OPEN_SUM: Mapping[str, Callable[[DataHolder, RecordDict], RecordDict]] = {
    "masks": answer_unmask,
    "he": answer_decrypt,
}
