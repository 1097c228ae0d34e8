"""The values a round passes between its steps. Frozen; checked when built; no behaviour."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.layout import AdapterState
from fedllm.errors import LayoutError

# A client's update carries its delta, and of numbers only these.
UPDATE_METRICS = ("weight", "num_tokens", "train_loss", "num_truncated", "seconds")
PROXIMAL_SPACES = ("factor", "product")
EVALUATION_METRICS = ("loss", "personal_loss", "num_tokens", "num_rows")
HOME_METRICS = ("alone", "shared", "home", "steps")


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Numbers of one client's training in one round; `learning_rate` is already the round's."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    dropout: float = 0.0  # of the adapters' inputs
    proximal: float = 0.0  # strength mu of FedProx
    proximal_space: str = "factor"  # what it pulls: "factor" or "product"

    def __post_init__(self) -> None:
        if self.proximal_space not in PROXIMAL_SPACES:  # any other would switch the pull off unnoticed
            raise LayoutError(f"the proximal space is one of {', '.join(PROXIMAL_SPACES)}")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Which of a node's clients train in a round, and from where; how they train is in the node's own plan.

    `drawn` names the clients, in order, and counts the rows each drew in earlier rounds, so that a client
    whose process is new every time still sees all its rows before any twice. A client trains the first
    `ranks[client]` ranks of `adapter`, on the base model with `base_delta` added. `plan_digest` names the
    configuration the server runs (`RunPlan.digest`). `control` is SCAFFOLD's c, where it is used
    (`fedllm.engine.gradient_terms`). `clip` is the norm to which clients clip what they send, where the
    server noises their sum; else 0. `evaluate` asks for the held-out loss of `adapter` too, measured before
    training.
    """

    round_num: int
    drawn: Mapping[str, int]
    ranks: Mapping[str, int]
    adapter: AdapterState
    base_delta: BaseDelta
    plan_digest: str
    control: AdapterState | None = None
    clip: float = 0.0
    evaluate: bool = False

    def __post_init__(self) -> None:
        full = self.adapter.layout.rank
        if self.ranks.keys() != self.drawn.keys():
            raise LayoutError("a train request gives every client its rank and the rows it has drawn")
        if not all(1 <= rank <= full for rank in self.ranks.values()):
            raise LayoutError(f"a train request gives a client a rank outside 1 to {full}")
        if self.control is not None and set(self.ranks.values()) != {full}:
            raise LayoutError("a train request has control variates for clients of different ranks")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest:
    """Which of a node's clients measure the held-out loss of `adapter`; the fields are a train request's.

    `drawn` also names what a client has kept for itself: its own B, its personal adapter.
    """

    round_num: int
    drawn: Mapping[str, int]
    adapter: AdapterState
    base_delta: BaseDelta
    plan_digest: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientUpdate:
    """What a client returns: `delta` [P_i] = after - before, its weight, and metrics from a fixed list.

    The delta is whole and of the client's own `rank`, with zeros where nothing was trained. An update with
    `members` is the weighted mean of several clients of one node: its weight is their sum, and each member
    holds its own numbers and no delta. `control_delta` [P] is the change of its control variate, where
    those are used. `held_out` is the loss of the adapter it started from, where that was asked for.
    """

    client_id: str
    round_num: int
    rank: int
    delta: torch.Tensor
    weight: float
    num_tokens: int
    train_loss: float
    num_truncated: int = 0
    seconds: float = 0.0
    members: tuple["ClientUpdate", ...] = ()
    control_delta: torch.Tensor | None = None
    held_out: "ClientEvaluation | None" = None


@dataclass(frozen=True, kw_only=True)
class ClientEvaluation:
    """Held-out loss of one client: mean over its supervised tokens, in nats.

    `personal_loss` is with the client's personal adapter on top, None where it has none.
    """

    client_id: str
    loss: float
    num_tokens: int
    num_rows: int
    personal_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class ClientAtHome:
    """What training on at home gave a client (`clients.at_home`): losses in nats per learnt token.

    `alone` is that of training from the initial adapter, `shared` that of the federation's adapter as it is,
    `home` that of the adapter after `steps` steps from there. All are on rows that have chosen nothing.
    """

    client_id: str
    alone: float
    shared: float
    home: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class ClientFailure:
    """A client that has no result: `code` is one of `errors.CLIENT_ERROR_CODES` or a server-side verdict.

    `sent_nothing` says that the client or its node reported the code in place of an update. Any other update
    may have left it: one that was refused, or lost on its way.
    """

    client_id: str
    code: str
    reason: str = ""  # the server's own words, never a client's
    sent_nothing: bool = False


@dataclass(frozen=True, kw_only=True)
class JoinedClient:
    """What a client declares when it joins; its later weights may not exceed these sizes.

    A client without usable rows declares `num_train` 0 and is left out. `max_rank` is the largest rank its
    machine has room for, 0 = any. `cause` is the code of the error for which it takes no part, "" for none.
    In a run of secret sums `run_key` is its public key of the run, signed in `key_signature` where its site
    has a key; `is_pinned` says that the site runs no code but what it allows by digest. Under secure.method =
    he `run_key` is the digest of its key for encryption, `public_key`.
    `commitment` stands for its training rows (a salted SHA-256, hex), and `consent` is its site's signature
    that they serve the run's purpose; both are empty where the site has no key.
    The server sets `site`: the name of the site in its list, else the key that signed, "" where none did; and
    `identity`, that key.
    """

    client_id: str
    node_id: int
    num_train: int
    num_held_out: int
    fingerprint: str
    max_rank: int = 0
    cause: str = ""
    run_key: bytes = b""
    key_signature: bytes = b""
    is_pinned: bool = False
    public_key: bytes = b""
    commitment: str = ""
    consent: bytes = b""
    site: str = ""
    identity: str = ""
