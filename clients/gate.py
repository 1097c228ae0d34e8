"""The gate that every question passes, whoever asks: what this machine's owner permits, and the log of it.

A question is admitted twice: by what it is and what its run says, before a file is opened, and by the work
it asks for, once rows and base model are known and before anything is computed. Then one entry of the
site's log says what was asked and what became of it. Without a site.toml neither limits nor log exist.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from flwr.app import RecordDict

from clients.data_holder import DataHolder
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.errors import PolicyError
from fedllm.site_policy import SitePolicy, load_policy


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Who asks, as the site itself knows it; "" where Flower's own process answers and nobody vouches for it.

    `server` is the address of the SuperLink, `node` the [nodes.NAME] of site.toml, `bundle` the SHA-256 of
    the code that the server shipped.
    """

    server: str = ""
    node: str = ""
    bundle: str = ""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a server asks: its `kind` is one of `site_policy.MESSAGES`, its run's keys come with it."""

    kind: str
    run_config: Mapping[str, Scalar]
    sender: Sender = Sender()

    @cached_property
    def policy(self) -> SitePolicy:
        """This machine's policy, read once for a question."""
        return load_policy()

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration; reading it refuses unknown keys and values out of range."""
        return RunConfig.from_flat(self.run_config)


def admit(question: Question) -> None:
    """Let a question pass by what it is and what its run says; nothing of the site is opened before.

    Raises:
        ConfigError: site.toml or the run's configuration cannot be read.
        PolicyError: the machine's owner does not permit it.
    """
    policy, sender = question.policy, question.sender
    if policy.file is None:
        return
    allow = policy.allow
    if allow.messages and question.kind not in allow.messages:
        raise PolicyError(f"{policy.file}: [allow] messages does not name {question.kind!r}")
    for name, who, allowed in (
        ("servers", sender.server, allow.servers),
        ("bundles", sender.bundle, allow.bundles),
    ):
        if allowed and who not in allowed:
            raise PolicyError(f"{policy.file}: [allow] {name} does not name {who or 'an unknown one'}")
    if allow.secure_aggregation == "required":
        raise PolicyError(
            f"{policy.file}: [allow] secure-aggregation = 'required', and secure aggregation does not exist"
            " yet: no run is admitted"
        )


def admit_work(question: Question, holder: DataHolder, content: RecordDict) -> None:
    """Let a question pass by the work it asks for, and count it; nothing is computed before.

    Raises:
        PolicyError: the machine's owner does not permit so much.
        QueryLimitError: the owner's number of such questions in a period is used up.
    """


def note(question: Question, code: str, content: RecordDict | None, seconds: float) -> None:
    """Write the log's entry on a question: `code` is "ok" or why it was not answered with `content`.

    Raises:
        CheckpointError: it cannot be written; then the answer must not leave.
    """
