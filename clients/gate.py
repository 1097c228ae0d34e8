"""The gate that every question passes, whoever asks: what this machine's owner permits, and the log of it.

A question is admitted twice: by what it is and what its run says, before a file is opened, and by the work
it asks for, once rows and base model are known and before anything is computed. Then one entry of the
site's log says what was asked and what became of it. Without a site.toml neither limits nor log exist. A site
that has withdrawn (`clients.withdrawn`) refuses all of them first, and what is being computed then ends.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from clients.asked import Asked, Asking, count, count_on_disk, count_run, count_update
from clients.data_holder import DataHolder
from clients.site import data_path_of
from clients.tokens import ClientTokens
from clients.withdrawn import check_not_withdrawn
from fedllm.chained_log import append
from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.engine.interruption import watched_steps
from fedllm.errors import CheckpointError, PolicyError, WithheldError
from fedllm.files import make_private_folder
from fedllm.plan.run_plan import RunPlan, resolve
from fedllm.site_policy import SitePolicy, load_policy
from fedllm.wire.digests import content_digest

LOG = "log.jsonl"  # in the state folder
_LONGEST = 200  # characters of a text from outside that enter the log


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
    """What a server asks: `action` is one of `MESSAGES` but stock; `is_stock`, by a stock strategy.

    `content` is what came with it, `run_config` the keys of its run, `node_config` what the node was started
    with.
    """

    action: str
    content: RecordDict
    run_config: Mapping[str, Scalar]
    node_config: Mapping[str, Scalar]
    is_stock: bool = False
    sender: Sender = Sender()

    @property
    def is_measured(self) -> bool:
        """Whether the answer holds held-out losses; a train request may ask for them too."""
        return self.action in ("evaluate", "adapt") or self.request.get("evaluate") is True

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the question in [allow] messages."""
        if self.is_stock:
            return ("stock",)
        return (self.action, "evaluate") if self.is_measured else (self.action,)

    @cached_property
    def policy(self) -> SitePolicy:
        """This machine's policy, read once for a question."""
        return load_policy()

    @cached_property
    def config(self) -> RunConfig:
        """The run's configuration; reading it refuses unknown keys and values out of range."""
        return RunConfig.from_flat(self.run_config)

    @cached_property
    def plan(self) -> RunPlan:
        """The run's plan, which refuses what cannot go together."""
        return resolve(self.config)

    @cached_property
    def run(self) -> str:
        """The run as it is counted: one that goes on keeps it, one that is called the same has its own."""
        return f"{self.sender.server} {self.config.run.name} {self.plan.digest}"

    @property
    def request(self) -> ConfigRecord:
        """What the question says of its round and clients, as the server wrote it."""
        return self.content.config_records.get("request", ConfigRecord())

    @property
    def num_steps(self) -> int:
        """Optimizer steps that each client takes for the answer: those of a round, or at home."""
        plan = self.plan
        if self.action == "adapt":
            return plan.at_home.most if plan.at_home is not None else 0
        return self.config.train.local_steps + (plan.personal.steps if plan.personal is not None else 0)


def admit(question: Question) -> None:
    """Let a question pass by what it is and what its run says; nothing of the site is opened before.

    Raises:
        ConfigError: site.toml or the run's configuration cannot be read.
        WithdrawnError: the machine's owner has withdrawn.
        PolicyError: the machine's owner does not permit it.
        CheckpointError: its run cannot be counted.
    """
    _check_not_withdrawn(question)
    if question.policy.file is not None:
        _check_sender(question)
        _check_run(question)
        # By now: whether rows can be opened under its columns and limits is an answer about them too.
        limits = question.policy.limits
        _count(question, lambda asked: count_run(asked, question.run, time.time(), limits))


def admit_work(question: Question, holder: DataHolder) -> None:
    """Let a question pass by the work it asks for, and count it; nothing is computed before.

    Raises:
        PolicyError: the machine's owner does not permit so much.
        QueryLimitError: the owner's number of such questions in a period is used up.
        CheckpointError: it cannot be counted.
    """
    policy = question.policy
    if policy.file is None:
        return
    if question.action == "overlap":
        _check_overlap(question, holder)
    tokens = _num_tokens(question, holder)
    if 0 < policy.limits.tokens < tokens:
        raise _refusal(question, f"[limits] tokens = {policy.limits.tokens}: this answer would take {tokens}")
    asking = Asking(
        run=question.run,
        action=question.action,
        steps=question.num_steps,
        is_measured=question.is_measured,
        now=time.time(),
    )
    _count(question, lambda asked: count(asked, asking, policy.limits))


@contextmanager
def in_time(question: Question) -> Iterator[None]:
    """End the work of the block where it takes longer than is permitted: training between two of its steps.

    Raises:
        PolicyError: it took longer.
        WithdrawnError: the machine's owner has withdrawn meanwhile.
    """
    most, began = question.policy.limits.seconds, time.monotonic()

    def check(*_: int) -> None:
        _check_not_withdrawn(question)
        if 0 < most < time.monotonic() - began:
            raise _refusal(question, f"[limits] seconds = {most:g}: the answer took longer")

    with watched_steps(check):
        yield
    if question.action == "train":  # what has trained in time may already be charged
        _check_not_withdrawn(question)
    else:
        check()


def note(question: Question, code: str, reply: RecordDict | None, seconds: float) -> None:
    """Write the log's entry on a question: `code` is "ok" or why there is no answer, `reply` what leaves.

    An update that leaves is counted too: only where its rows were trained on may a run ask what of them its
    texts repeat.

    Raises:
        CheckpointError: it cannot be written; then the answer must not leave.
    """
    policy = question.policy
    if policy.file is None:
        return
    num_bytes = 0 if reply is None else _num_bytes(reply)
    if question.action == "train" and num_bytes:
        _count(question, lambda asked: count_update(asked, question.run))
    round_num, names = question.request.get("round"), question.request.get("client-ids")
    entry = {
        "question": f"stock {question.action}" if question.is_stock else question.action,
        **vars(question.sender),
        "run": str(question.run_config.get("run.name", ""))[:_LONGEST],
        "round": round_num if isinstance(round_num, int) and abs(round_num) < 2**53 else 0,
        "clients": len(names) if isinstance(names, list) else 0,
        "code": code,
        "bytes": num_bytes,
        "answer": "" if reply is None else content_digest(reply),  # as in the server's log
        "seconds": round(seconds, 3),
    }
    _append(policy, entry)


def note_refused(sender: Sender, code: str) -> None:
    """Write the log's entry on a sender that was not even let in to ask; raises as `note`."""
    policy = load_policy()
    if policy.file is not None:
        _append(policy, {"question": "", **vars(sender), "code": code})


def _append(policy: SitePolicy, entry: Mapping[str, Any]) -> None:
    try:
        make_private_folder(policy.state_folder)
        append(policy.state_folder / LOG, entry)
    except OSError as error:
        raise CheckpointError(
            f"the site's log in {policy.state_folder} cannot be written ({error.strerror}): nothing leaves"
        ) from None


def data_set_of(node_config: Mapping[str, Scalar]) -> str:
    """Return what names the rows of a node, whatever run asks for them: their path, else its share."""
    path = data_path_of(node_config)
    if path is not None:
        return str(path)
    return f"{node_config.get('partition-id', 0)} of {node_config.get('num-partitions', 1)}"


def _count(question: Question, change: Callable[[Asked], Asked]) -> None:
    folder = question.policy.state_folder / "asked"
    count_on_disk(folder, data_set_of(question.node_config), change)


def _num_bytes(reply: RecordDict) -> int:
    return sum(len(array.data) for record in reply.array_records.values() for array in record.values())


def _refusal(question: Question, why: str) -> PolicyError:
    return PolicyError(f"{question.policy.file}: {why}")


def _check_not_withdrawn(question: Question) -> None:
    check_not_withdrawn(question.policy, question.sender.node, question.node_config)


def _check_sender(question: Question) -> None:
    allow, sender = question.policy.allow, question.sender
    for kind in question.kinds if allow.messages else ():
        if kind not in allow.messages:
            raise _refusal(question, f"[allow] messages does not name {kind!r}")
    for name, who, allowed in (
        ("servers", sender.server, allow.servers),
        ("bundles", sender.bundle, allow.bundle_digests),
    ):
        if allowed and who not in allowed:  # without the site's service nobody knows who asks
            raise _refusal(question, f"[allow] {name} does not name {who or 'whoever asks a bare node'}")


def _check_run(question: Question) -> None:
    """Refuse a run that as a whole asks for more than is permitted, at its first question already."""
    allow, limits, config = question.policy.allow, question.policy.limits, question.config
    secure = question.plan.secure
    if allow.secure_aggregation == "required" and (secure is None or not secure.withstands_lies):
        raise _refusal(
            question,
            "[allow] secure-aggregation = 'required', and the run's secure.method is"
            f" {config.secure.method!r}; masks and shares hide an update from a server that lies",
        )
    purpose = str(question.run_config.get("run.purpose", ""))
    if allow.purposes and purpose not in allow.purposes:
        raise _refusal(question, f"[allow] purposes does not name run.purpose = {purpose[:_LONGEST]!r}")
    steps, rounds, personal = question.num_steps, config.federation.num_rounds, question.plan.personal
    rank = max(config.lora.rank, personal.rank if personal is not None else 0)
    for name, asked, most in (
        ("steps", steps, limits.steps),
        ("run-steps", steps * (1 if question.action == "adapt" else rounds), limits.run_steps),
        ("rounds", rounds, limits.rounds),
        ("rank", rank, limits.rank),
    ):
        if 0 < most < asked:
            raise _refusal(question, f"[limits] {name} = {most}, and the run asks for {asked}")
    rows = config.train.local_steps * config.train.batch_size
    if rows < limits.train_rows:
        raise _refusal(question, f"[limits] train-rows = {limits.train_rows}, and a round trains on {rows}")


def _check_overlap(question: Question, holder: DataHolder) -> None:
    """Refuse a count of the server's texts but where the run has synthetic ones to screen."""
    distillation, round_num = holder.plan.distillation, question.request.get("round")
    has_texts = distillation is not None and distillation.has_synthetic and distillation.is_screened
    is_due = distillation is not None and isinstance(round_num, int) and distillation.is_due(round_num)
    if not has_texts or not is_due:
        raise _refusal(question, "the run distils on no synthetic text in this round, so none is compared")
    if not question.policy.is_exact:
        raise WithheldError("[allow] exact-numbers or [budget]: counts of private text stay on this machine")


def _num_tokens(question: Question, holder: DataHolder) -> int:
    """Return the most tokens that the answer is computed from."""
    asked = question.request.get("client-ids", [])
    names = asked if isinstance(asked, list) and not question.is_stock else list(holder.clients)
    clients = [client for name, client in holder.clients.items() if name in names]
    measured = clients if question.is_measured else []
    tokens = sum(len(row.tokens) for client in measured for row in client.held_out)
    if question.action in ("train", "adapt"):
        rows = question.num_steps * question.config.train.batch_size
        tokens += sum(rows * _longest(client, question.config.train.max_length) for client in clients)
    return tokens


def _longest(client: ClientTokens, limit: int) -> int:
    if client.num_public is not None:  # a refusal must not tell how long its rows are
        return limit
    return max((len(row.tokens) for row in client.train), default=0)
