"""Whether the clients that a node declares may take part: whose they are, and of use to the run."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from flwr.app import RecordDict

from fedllm.adapters.layout import AdapterLayout
from fedllm.errors import PERMANENT_CAUSES, WireError
from fedllm.identity import verify
from fedllm.messages import JoinedClient
from fedllm.plan.run_plan import RunPlan
from fedllm.secure.homomorphic import key_digest
from fedllm.secure.parties import party_statement
from fedllm.wire.joining import consent_statement, join_statement, read_joined, read_signer
from strategies.sites import Site, Sites

_KEY_SHOWN = 24  # letters of a public key that are enough to find it


@dataclass(frozen=True, eq=False)
class Admission:
    """What decides who may join a run; no `sites` admit any, but for the clients that are `left_out`."""

    plan: RunPlan
    layout: AdapterLayout
    sites: Sites | None = None
    left_out: Collection[str] = ()

    @property
    def num_expected(self) -> int:
        """How many clients the run waits for before its first round."""
        return self.plan.config.federation.num_clients - len(self.left_out)

    def read(self, content: RecordDict, node_id: int, nonce: str) -> list[JoinedClient]:
        """Return the clients that a node declares in answer to the question with `nonce`, with their site.

        Raises:
            WireError: the answer is malformed, its signature is wrong, or its site is not admitted for that.
        """
        config = self.plan.config
        clients = read_joined(content, node_id, most=config.federation.num_clients)
        signer = read_signer(content, join_statement(nonce, config.run.name, self.plan.digest, clients))
        for client in clients:
            consent = consent_statement(config.run.name, self.plan.digest, config.run.purpose, client)
            if client.consent and not verify(signer, consent, client.consent):
                raise WireError("its site's consent is not to this run, its purpose and these rows")
        clients = [replace(client, identity=signer) for client in clients]
        if self.sites is None or not clients:
            return [replace(client, site=signer) for client in clients]
        site = self.sites.get(signer)
        if site is None:
            if not signer:
                raise WireError("its site has not signed, and federation.sites admits none without a key")
            raise WireError(f"its site's key, {signer[:_KEY_SHOWN]}..., is not in federation.sites")
        for client in clients:
            if site.clients and client.client_id not in site.clients:
                raise WireError(f"site {site.name} may not speak for client {client.client_id}")
        return [replace(client, site=site.name) for client in clients]

    def refusal_of_claim(
        self, client: JoinedClient, taken: Mapping[str, JoinedClient], connected: Collection[int]
    ) -> str:
        """Return why a client may not have its name, or not besides those `taken` already; "" where it may.

        A connected node keeps its clients; one that is gone was restarted, perhaps under another id.
        """
        if client.client_id in self.left_out:
            return "the run goes on without it"
        known = taken.get(client.client_id)
        if known is not None and known.site != client.site:
            return "another site declared it before, whose it stays"
        if known is not None and known.node_id != client.node_id and known.node_id in connected:
            return "two nodes declare it; the second is left out"
        site = self._site_named(client.site)
        if site is None:
            return ""
        others = [one for one in taken.values() if one.site == site.name and one is not known]
        if len(others) >= site.most_clients:
            return f"federation.sites admits {site.most_clients} clients of site {site.name}"
        rows = client.num_train + sum(one.num_train for one in others)
        if site.max_rows and rows > site.max_rows:
            return f"site {site.name} declares {rows:,} rows, federation.sites admits {site.max_rows:,}"
        return ""

    def refusal_of(self, client: JoinedClient) -> str:
        """Return why the run cannot use a client, "" where it can."""
        if client.num_train == 0:
            cause = PERMANENT_CAUSES.get(client.cause)
            return f"has no data to train on ({cause})" if cause else "has no data"
        # The same names and shapes are not enough: a delta is one of certain base weights.
        if client.fingerprint != self.layout.fingerprint:
            theirs, ours = client.fingerprint[:12], self.layout.fingerprint[:12]
            return f"holds another base model ({theirs}) than the run ({ours})"
        needs = "train.control-variates" if self.plan.config.train.control_variates else "secure.method"
        if needs == "secure.method" and self.plan.secure is None:
            return ""
        if 0 < client.max_rank < self.layout.rank:
            return (
                f"has room for rank {client.max_rank} only, and {needs} needs the run's {self.layout.rank},"
            )
        return "" if self.plan.secure is None else self._refusal_of_key(client)

    def warning_of(self, clients: Collection[JoinedClient]) -> str:
        """Return what secret sums are worth where sites let the server choose their code, "" elsewhere."""
        loose = sum(not client.is_pinned for client in clients)
        if self.plan.secure is None or not loose:
            return ""
        return (
            f"secret sums: {loose} of {len(clients)} clients run whatever code the server ships, which might"
            " send their updates in the clear; they are worth something where sites pin the code ([allow]"
            " bundles)"
        )

    def _refusal_of_key(self, client: JoinedClient) -> str:
        """Return why a client cannot take part in secret sums, "" where it can."""
        if not client.run_key:
            return "has sent no key for secure.method"
        signed = party_statement(
            self.plan.config.run.name, self.plan.digest, client.client_id, client.run_key
        )
        if client.identity and not verify(client.identity, signed, client.key_signature):
            return "has a key for secure.method that its site has not signed"
        if self.plan.config.secure.method == "he" and client.run_key != key_digest(client.public_key):
            return "has sent another key for encryption than that of its run key"
        return ""

    def _site_named(self, name: str) -> Site | None:
        return next((site for site in (self.sites or {}).values() if site.name == name), None)
