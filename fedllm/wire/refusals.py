"""A refusal: a reply that holds an error code and nothing else, in the form that its asker reads.

It needs no torch, so that a process which only carries messages can refuse one as well.
"""

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedllm.errors import CLIENT_ERROR_CODES, WithdrawnError


def is_fedllm_request(content: RecordDict) -> bool:
    """Return whether a message was written by `write_train_request` or `write_evaluate_request`.

    Anything else is taken as a request of a stock Flower strategy, whose arrays are named PEFT tensors.
    """
    return "request" in content.config_records and "adapter" in content.array_records


def is_stock(message: Message) -> bool:
    """Return whether a stock Flower strategy asks: for training or evaluation, without our records."""
    category = message.metadata.message_type.partition(".")[0]
    return category in ("train", "evaluate") and not is_fedllm_request(message.content)


def write_error(code: str) -> RecordDict:
    """Return a reply that says only why there is no answer: a code of `CLIENT_ERROR_CODES`."""
    return RecordDict({"error": ConfigRecord({"code": code if code in CLIENT_ERROR_CODES else "internal"})})


def write_withdrawn(record: bytes) -> RecordDict:
    """Return the reply of a site that has withdrawn: the code and its signed record (`fedllm.withdrawal`)."""
    return RecordDict({**write_error(WithdrawnError.code), "withdrawal": ConfigRecord({"record": record})})


def read_withdrawn(content: RecordDict) -> bytes:
    """Return the signed record in a reply, not yet checked; b"" where there is none."""
    record = content.config_records.get("withdrawal", ConfigRecord()).get("record")
    return record if isinstance(record, bytes) else b""


def read_error(content: RecordDict) -> str | None:
    """Return the code of an error reply, "internal" for a code outside the list, None for other replies."""
    if "error" not in content.config_records:
        return None
    code = content.config_records["error"].get("code")
    return code if isinstance(code, str) and code in CLIENT_ERROR_CODES else "internal"


def refusal(message: Message, code: str) -> Message:
    """Return the reply to `message` that says only why there is no answer."""
    if is_stock(message):  # stock strategies drop error messages and abort on anything else
        return Message(
            Error(code=0, reason=code if code in CLIENT_ERROR_CODES else "internal"), reply_to=message
        )
    return Message(write_error(code), reply_to=message)
