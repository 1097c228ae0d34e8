"""Errors a person can act on: one line that says what, where and what to do.

Every error of fedllm that a user or a peer can cause derives from `FedLLMError`. The command line prints
only its message; programming mistakes stay ordinary exceptions with a traceback.
"""


class FedLLMError(Exception):
    """Base of all expected failures. `code` is the only part of an error that may leave a client.

    `cause` is what a server says of a node that reports the code; "" where asking again may help.
    """

    code = "failed"
    cause = ""


class ConfigError(FedLLMError, ValueError):
    """A configuration key or value is unknown, out of range or contradicts another."""

    code = "bad-config"
    cause = "its owner's policy or its configuration does not allow the run"


class PolicyError(FedLLMError, PermissionError):
    """A machine's owner does not permit what a server asks, or what this machine was told to do."""

    code = "policy"
    cause = "its owner's policy does not permit what was asked; its log says which line"


class WithdrawnError(FedLLMError):
    """A site has withdrawn from all runs; `record` is what it has signed of that (`fedllm.withdrawal`)."""

    code = "withdrawn"
    cause = "its site has withdrawn and answers nobody any more"

    def __init__(self, message: str, record: bytes = b""):
        super().__init__(message)
        self.record = record


class OtherConfigError(ConfigError):
    """A server runs another configuration than this node was given."""

    code = "other-config"
    cause = "it was given another configuration than the server"


class DataError(FedLLMError, ValueError):
    """A data source, row, column or partition cannot be used. Never quotes the text of a row."""

    code = "bad-data"
    cause = "its rows cannot be read as the run describes them"


class NoDataError(DataError):
    """A client holds no usable row; it is left out of the run."""

    code = "no-data"
    cause = "it has no usable row"


class RowsLostError(DataError):
    """So many rows of a client are of no use that it does not take part."""

    code = "rows-lost"
    cause = "too many of its rows are of no use, as where train.max-length cuts answers; its log has the cure"


class ModelError(FedLLMError, RuntimeError):
    """A base model is absent, unsupported or not the one the run uses."""

    code = "bad-model"
    cause = "its copy of the base model is absent, damaged or not supported, or its device cannot load it"


class LayoutError(FedLLMError, ValueError):
    """An adapter does not have the names, shapes or base model that the run expects."""

    code = "wrong-layout"
    cause = "its base model has other layers than the server's"


class IntegrityError(FedLLMError, ValueError):
    """Bytes, a checkpoint or an adapter folder were damaged or tampered with."""

    code = "damaged"


class WireError(IntegrityError):
    """A packet cannot be decoded: wrong magic, version, length, checksum or payload."""

    code = "bad-packet"


class NotHeldError(FedLLMError, LookupError):
    """A request leaves out what this machine was thought to hold; the next one brings it whole."""

    code = "not-held"


class QueryLimitError(FedLLMError, PermissionError):
    """A server asks more about private text than a node answers."""

    code = "query-limit"


class NonFiniteError(FedLLMError, ArithmeticError):
    """Training produced NaN or infinity; nothing is sent."""

    code = "non-finite"
    cause = "training gave NaN or infinity; lower train.learning-rate"


class CheckpointError(FedLLMError, OSError):
    """A checkpoint or a client's private state could not be written, or there is none to resume from."""

    code = "checkpoint"


class RunFailedError(FedLLMError, RuntimeError):
    """A run stopped because too many rounds or clients failed."""

    code = "run-failed"


class DivergedError(RunFailedError):
    """A run's losses are no finite numbers any more: what it trained is not a result."""

    code = "diverged"


class BudgetSpentError(FedLLMError, RuntimeError):
    """One more round would exceed the privacy budget; what has been trained is kept."""

    code = "budget-spent"
    cause = "its privacy budget is spent"


class WithheldError(FedLLMError, PermissionError):
    """A number is asked for that the privacy plan, or the machine's owner, keeps with the client."""

    code = "withheld"
    cause = "its privacy plan or its owner keeps the number that was asked for"


class SecureError(FedLLMError, ValueError):
    """A message of a secret sum is wrong; `party` names who sent it, "" where nobody in particular did."""

    code = "bad-mask"

    def __init__(self, message: str, party: str = ""):
        super().__init__(message)
        self.party = party


class MaskReuseError(SecureError):
    """A server asks for a second vector, or a second list of those who answered, under one label."""

    code = "mask-reuse"


class BadPartiesError(SecureError):
    """The parties of a secret sum are not those that this machine's owner trusts to be others."""

    code = "bad-parties"


class TooFewPartiesError(SecureError):
    """Too few parties are in a secret sum, or have answered, to hide one another."""

    code = "too-few-parties"


class SiteAwayError(FedLLMError, ConnectionError):
    """A node's site service does not answer, or not to the end, or does not know who asks."""

    code = "site-away"


class OtherVersionError(FedLLMError, RuntimeError):
    """Two sides of a site, or a server and a site, run different versions of fedllm or of a library."""

    code = "other-version"
    cause = "it runs another version of fedllm, torch or transformers than the server; its log says which"


class CancelledError(FedLLMError):
    """Nobody waits for an answer any more."""

    code = "cancelled"


class MissingExtraError(FedLLMError, ImportError):
    """An optional package is needed; the message names the install command."""

    code = "missing-package"
    cause = "a package is not installed there; its log names the install command"


_REPORTED = (
    *(
        FedLLMError,
        ConfigError,
        PolicyError,
        WithdrawnError,
        OtherConfigError,
        DataError,
        NoDataError,
        RowsLostError,
    ),
    *(ModelError, LayoutError),
    *(WireError, NotHeldError, QueryLimitError, NonFiniteError, CheckpointError, BudgetSpentError),
    *(WithheldError, SiteAwayError, OtherVersionError, CancelledError, MissingExtraError),
    *(SecureError, MaskReuseError, BadPartiesError, TooFewPartiesError),
)
# What a client may report in place of an update. Strings outside this set never travel.
CLIENT_ERROR_CODES = frozenset(error.code for error in _REPORTED) | {"out-of-memory", "internal"}
# Codes of which a node would say the same if it were asked again, each with what a server says of them.
PERMANENT_CAUSES = {error.code: error.cause for error in _REPORTED if error.cause}
