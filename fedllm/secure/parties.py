"""Who takes part in a secret sum, and what a node checks of them before it adds its own vector."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil

from fedllm.errors import BadPartiesError, TooFewPartiesError
from fedllm.identity import statement, verify
from fedllm.secure.agreement import KEY_BYTES

LABEL_BYTES = 32
MOST_TOGETHER = 100  # above, masks for all pairs cost more than smaller groups
GROUP_SIZE = 64


@dataclass(frozen=True)
class Party:
    """A party of a secret sum: a client, or a node that sums its own clients first.

    `run_key` is its public key [32 bytes] of this run, `identity` the key of its site as
    `identity.public_text`, and `signature` the site's of `party_statement`; both are empty where a site has
    no key.
    """

    name: str
    run_key: bytes
    identity: str = ""
    signature: bytes = b""


@dataclass(frozen=True)
class Exchange:
    """One secret sum: its label [32 bytes], never used twice, and its parties in the order of their names.

    `terms` is the digest of all else that the parties must be told alike, such as the adapter that they start
    from: a server that told all but one of them something under which they add nothing would learn that one's
    vector from the sum (Pasquini et al. 2022, arXiv 2111.07380).
    """

    label: bytes
    parties: tuple[Party, ...]
    terms: bytes = b""

    @property
    def threshold(self) -> int:
        """How many parties must answer to the end."""
        return threshold_of(len(self.parties))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parties' names."""
        return tuple(party.name for party in self.parties)

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of label, names, run keys and terms: parties that were told otherwise share no mask."""
        told = [self.label.hex(), [[party.name, party.run_key.hex()] for party in self.parties]]
        named = {"told": told, "terms": self.terms.hex()}
        return hashlib.sha256(statement("fedllm secret sum 1", named)).digest()


def threshold_of(num_parties: int) -> int:
    """Return how many of `num_parties` must answer to the end.

    Two thirds of them, rounded up: a server that tells parties different lists then finds no two groups that
    both reach it without a third of the parties on its side.
    """
    return ceil(2 * num_parties / 3)


def group_sizes(num_parties: int) -> list[int]:
    """Return how many parties each sum has: all in one up to 100, else groups of nearly equal size."""
    number = 1 if num_parties <= MOST_TOGETHER else ceil(num_parties / GROUP_SIZE)
    return [len(range(index, num_parties, number)) for index in range(number)]


def label_of(run: str, plan_digest: str, round_number: int, attempt: int, fresh: bytes) -> bytes:
    """Return the label of one exchange; with 16 `fresh` random bytes, a restarted server has a new one."""
    values = {
        "run": run,
        "plan": plan_digest,
        "round": round_number,
        "attempt": attempt,
        "fresh": fresh.hex(),
    }
    return hashlib.sha256(statement("fedllm secret sum label 1", values)).digest()


def party_statement(run: str, plan_digest: str, name: str, run_key: bytes) -> bytes:
    """Return what a site signs to say that a run key is that of its client `name` in this run."""
    return statement(
        "fedllm run key 1", {"run": run, "plan": plan_digest, "name": name, "key": run_key.hex()}
    )


def in_groups(parties: Sequence[Party], label: bytes) -> list[Exchange]:
    """Return one exchange of all parties, or where there are more than 100 of groups of about 64.

    Keys of the run decide who is in which group, so another attempt at a round has the same groups: the
    difference of two that overlap would be the sum of few. Each has a label of its own.
    """
    if len(parties) <= MOST_TOGETHER:
        return [Exchange(label, tuple(sorted(parties, key=lambda party: party.name)))]
    mixed = sorted(parties, key=lambda party: party.run_key)
    number = len(group_sizes(len(parties)))
    groups = [sorted(mixed[index::number], key=lambda party: party.name) for index in range(number)]
    labels = [hashlib.sha256(label + index.to_bytes(4)).digest() for index in range(number)]
    return [Exchange(own, tuple(group)) for own, group in zip(labels, groups, strict=True)]


def check_parties(
    exchange: Exchange,
    me: str,
    run_key: bytes,
    *,
    run: str,
    plan_digest: str,
    min_parties: int,
    peers: Collection[str] | None,
) -> None:
    """Refuse an exchange in which party `me` with this `run_key` might not be hidden.

    `peers` are the public keys of the sites that this one trusts to be others, itself among them; None where
    the site names none. Then every site may be the server itself, and the check is worth little.

    Raises:
        BadPartiesError: names or keys are doubled or out of order, this party is not among them with its own
            key, or a key is not signed by a peer.
        TooFewPartiesError: there are fewer than `min_parties`, counted by their sites where peers are named.
    """
    keys = [party.run_key for party in exchange.parties]
    if len(exchange.label) != LABEL_BYTES or any(len(key) != KEY_BYTES for key in keys):
        raise BadPartiesError("the label or a key of the secret sum has another length than it should")
    for before, after in zip(exchange.names, exchange.names[1:], strict=False):
        if before >= after:
            raise BadPartiesError(f"party {after} is doubled or out of order in the secret sum", after)
    if len(set(keys)) < len(keys):
        raise BadPartiesError("two parties of the secret sum have one key")
    if (me, run_key) not in [(party.name, party.run_key) for party in exchange.parties]:
        raise BadPartiesError(f"the parties of the secret sum do not hold {me} with its own key", me)
    number = len(exchange.parties)
    if peers is not None:
        for party in exchange.parties:
            signed = party_statement(run, plan_digest, party.name, party.run_key)
            if party.identity not in peers or not verify(party.identity, signed, party.signature):
                raise BadPartiesError(
                    f"the key of party {party.name} is not signed by a site of [peers]", party.name
                )
        number = len({party.identity for party in exchange.parties})
    if number < min_parties:
        raise TooFewPartiesError(
            f"{number} parties in the secret sum, and at least {min_parties} hide one another"
        )
