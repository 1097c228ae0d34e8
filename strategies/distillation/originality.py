"""Which of the server's synthetic texts are new: each is screened before anything learns from it.

The server holds no private text, so the nodes that do are asked for counts (`fedllm.originality.overlap`);
whatever else can be measured is measured here. A text that could not be checked is not used.
"""

import secrets
from collections.abc import Callable, Collection, Sequence

import torch

from fedllm.attacks.membership import leads, likelihood, outliers
from fedllm.attacks.token_scores import no_adapter, score
from fedllm.engine.engine import Engine
from fedllm.errors import WireError
from fedllm.models.chat import Encoded, form_tokens
from fedllm.originality.duplicates import contaminated, near_duplicates
from fedllm.originality.overlap import SALT_BYTES, Overlap, OverlapRequest, most, probe, without_form
from fedllm.originality.verdict import FILE, Provenance, Screening, Verdict, tokens_digest, write_screening
from fedllm.wire.overlaps import read_overlaps, write_overlap_request
from strategies.distillation.teachers import ClientAdapter
from strategies.session import Session

UNSTATED = "not stated by the run; the terms of the base model and of the data holders bind"


def text_screen(
    session: Session,
    engine: Engine,
    adapters: Sequence[ClientAdapter],
    round_num: int,
    clients: Collection[str] | None = None,
) -> Callable[[Sequence[Encoded], Sequence[Encoded]], list[bool]]:
    """Return the screen of a round: from texts, and public ones that none may repeat, to whether each passes.

    `clients` are those of `screen`. Its verdicts are kept as `synthetic.json` in the run's folder, if there
    is one. It may be called once, since data holders answer one query about originality a round.
    """

    def screen_texts(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
        verdicts = screen(
            session,
            texts,
            round_num=round_num,
            clients=clients,
            boilerplate=form_tokens(engine.base.tokenizer),
            public=public,
            known=known_to_one(engine, [adapter.vector for adapter in adapters], texts),
        )
        if session.folder is not None:
            provenance = _provenance(session, adapters, round_num)
            write_screening(session.folder / FILE, Screening(provenance, verdicts))
        return [verdict.passed for verdict in verdicts]

    return screen_texts


def _provenance(session: Session, adapters: Sequence[ClientAdapter], round_num: int) -> Provenance:
    config = session.config
    return Provenance(
        run=config.run.name,
        round_num=round_num,
        model=config.model.name,
        fingerprint=session.layout.fingerprint,
        source="client adapters",
        adapters=tuple(adapter.digest for adapter in adapters),
        seed=config.seed,
        temperature=1.0,
        licence=config.distill.licence or UNSTATED,
    )


def screen(
    session: Session,
    texts: Sequence[Encoded],
    *,
    round_num: int,
    clients: Collection[str] | None = None,
    boilerplate: Sequence[int] = (),
    public: Sequence[Encoded] = (),
    known: Sequence[bool] | None = None,
) -> tuple[Verdict, ...]:
    """Return the verdict on every text, in order. One call may be made in a round, counted from 1.

    `clients` are those whose private text the texts may repeat, by default all of the session's: if the node
    of one does not answer, no text passes. `boilerplate` is what every text has by its form alone
    (`fedllm.models.chat.form_tokens`), `public` the texts none may repeat, such as those that results are
    measured on. `known` says which texts the membership gate refuses (`known_to_one`), where that was
    measured.

    Raises:
        DataError: there are more texts, or longer ones, than a query may ask about.
    """
    if not texts:
        return ()
    tokens = [without_form(row.tokens, boilerplate) for row in texts]
    copies = near_duplicates(tokens)
    repeats = contaminated(tokens, [without_form(row.tokens, boilerplate) for row in public])
    found = ask_overlap(session, tokens, round_num=round_num, clients=clients, boilerplate=boilerplate)
    return tuple(
        Verdict(
            digest=tokens_digest(texts[number].tokens),
            overlap=None if found is None else found[number].is_original,
            duplicate=copies[number] is None and not repeats[number],
            membership=None if known is None else not known[number],
            num_shingles=0 if found is None else found[number].num_shingles,
            num_matched=0 if found is None else found[number].num_matched,
            verbatim=found is not None and found[number].verbatim,
        )
        for number in range(len(texts))
    )


def known_to_one(
    engine: Engine, adapters: Sequence[torch.Tensor], texts: Sequence[Encoded]
) -> tuple[bool, ...]:
    """Return which texts one client's adapter [P] knows far better than all others and the base model do.

    That is the membership gate, `known` of `screen`. The base must have the base delta that the adapters were
    trained on.
    """
    scores = score(engine, [*adapters, no_adapter(engine)], texts)
    # An adapter of zeros is the base model: the last of the scores.
    *clients, base = ([likelihood(one) for one in found] for found in scores)
    return outliers(leads(clients, base))


def ask_overlap(
    session: Session,
    tokens: Sequence[Sequence[int]],
    *,
    round_num: int,
    clients: Collection[str] | None = None,
    boilerplate: Sequence[int] = (),
) -> tuple[Overlap, ...] | None:
    """Return for every text the largest overlap that a node of `clients` counts, None if one does not answer.

    The key of the hashes is new for every query, so two queries cannot be compared.
    """
    salt = secrets.token_bytes(SALT_BYTES)  # not from the run's seed: whoever knows that could hash ahead
    probes = tuple(probe(text, salt, boilerplate) for text in tokens)
    nodes = session.by_node(session.clients if clients is None else clients)
    absent = sorted(set(nodes) - set(session.transport.node_ids()))
    for node in absent:
        session.watch.notice(f"node {node} cannot be asked about synthetic text: it is away or busy")
    if absent or not nodes:  # who does not answer may be the one whose text was copied
        return None
    content = write_overlap_request(OverlapRequest(round_num, salt, probes))
    answers = []
    for reply in session.transport.exchange(
        dict.fromkeys(nodes, content),
        message_type="query.overlap",
        group=str(round_num),
        deadline=session.deadline("query.overlap"),
    ):
        try:
            answers.append(read_overlaps(reply.received(), probes))
        except WireError as error:
            session.watch.notice(f"node {reply.node_id} did not check synthetic text: {error}")
    return most(answers) if len(answers) == len(nodes) else None
