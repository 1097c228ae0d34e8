"""A client under masks: what leaves it, what it checks first, and that a label is good for one answer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from clients import protect
from clients.data_holder import DataHolder
from clients.handlers import FOR_FEDLLM
from clients.join import declare_clients
from clients.masks import answer_unmask, train_masked
from clients.process import Process
from clients.run_keys import run_keys
from clients.stock import train_for_stock
from clients.train import train_clients
from fedllm.adapters.parts import part_of, part_size
from fedllm.errors import BadPartiesError, ConfigError, OtherConfigError, SecureError, TooFewPartiesError
from fedllm.identity import new_key, public_text
from fedllm.messages import ClientUpdate, TrainRequest
from fedllm.secure.agreement import new_key as new_run_key
from fedllm.secure.agreement import public_of
from fedllm.secure.masking import check_masked, check_opening, unmasked
from fedllm.secure.parties import Exchange, Party
from fedllm.secure.ring import unpack
from fedllm.secure.vector import SecretSum, read_sum
from fedllm.wire import masks, replies, requests
from tests.builders import train_request

NAMES = ("anna", "ben", "cleo", "dora")
LABEL = bytes(range(32))
LARGEST, CAP = 0.1, 20.0
MASKS = {"secure.method": "masks", "federation.num-clients": 4}


@pytest.fixture
def open_node(write_rows: Callable, make_config: Callable, tmp_path: Path) -> Callable[..., DataHolder]:
    """Return a function (**flat) -> the data holder of four clients, in a process of its own."""
    file = write_rows("rows.jsonl", {name: 6 + 2 * place for place, name in enumerate(NAMES)})

    def start(**flat: Any) -> DataHolder:
        node = {"server-paths": True, "state-path": str(tmp_path / "state")}
        return Process().open(make_config(file, **MASKS, **flat).to_flat(), node)

    return start


@dataclass(frozen=True)
class Server:
    """The little of a server that one node's clients see in one round."""

    holder: DataHolder
    label: bytes = LABEL
    identity: str = ""
    weight_cap: float = CAP

    @property
    def parties(self) -> tuple[Party, ...]:
        """Those that the node declares; where it sums its clients, the first alone."""
        clients = declare_clients(self.holder, 1)
        declared = (Party(c.client_id, c.run_key, self.identity, c.key_signature) for c in clients)
        return tuple(declared)[: 1 if self.holder.plan.aggregation.node_sum else None]

    @property
    def exchange(self) -> Exchange:
        """The sum that all parties were told of alike."""
        request = train(self.holder)
        return self.asked().agreed(1, request.adapter.digest, request.base_delta.digest, 0.0).exchange

    def told(self, *others: Party) -> Exchange:
        return Exchange(self.label, tuple(sorted((*self.parties, *others), key=lambda party: party.name)))

    def asked(self, *others: Party, **changes: Any) -> masks.AskedSum:
        values: dict[str, Any] = {
            "exchange": self.told(*others),
            "num_clients": len(NAMES),
            "weight_cap": self.weight_cap,
            "largest": LARGEST,
            "clients": NAMES,
        }
        return masks.AskedSum(**{**values, **changes})

    def train(self, *sums: masks.AskedSum, names: Sequence[str] = NAMES, **changes: Any) -> RecordDict:
        content = RecordDict()
        masks.add_sums(content, sums or [self.asked()])
        return train_masked(self.holder, train_request(self.holder, *names, **changes), content)

    def masked(self, content: RecordDict) -> masks.HiddenAnswer:
        exchange = self.exchange
        answer = masks.read_masked(content, dict.fromkeys(exchange.names, exchange), most=len(NAMES))
        for name, one in answer.hidden.items():
            check_masked(one, exchange, name)
        return answer

    def question(self, answer: masks.HiddenAnswer, answered: Sequence[str]) -> masks.Unmasking:
        exchange, found = self.exchange, answer.hidden
        places = {name: place for place, name in enumerate(exchange.names)}
        return masks.Unmasking(
            label=self.label,
            answered=tuple(answered),
            boxes={to: [found[by].boxes[places[to]] for by in answered] for to in answered},
            commitments={to: [found[by].commitments[places[to]] for by in answered] for to in answered},
        )

    def unmask(self, *unmaskings: masks.Unmasking) -> tuple[Mapping[str, bytes], dict[str, str]]:
        content = masks.write_unmask(unmaskings, round_num=1, plan_digest=self.holder.plan.digest)
        openings, failed = masks.read_openings(answer_unmask(self.holder, content), most=len(NAMES))
        return openings, {name: failure.code for name, failure in failed.items()}

    def open(self, answer: masks.HiddenAnswer, answered: Sequence[str]) -> np.ndarray:
        exchange = self.exchange
        size = part_size(self.holder.engine.layout, "b") + 3
        words = np.zeros(size, np.uint32)
        for name in answered:
            words += unpack(answer.hidden[name].packed, size)
        openings, failed = self.unmask(self.question(answer, answered))
        assert not failed
        commitments = {name: answer.hidden[name].commitments for name in answered}
        for name, found in openings.items():
            check_opening(found, name, exchange, answered, commitments)
        return unmasked(exchange, words, answered, dict(openings))

    def read(self, words: np.ndarray) -> SecretSum:
        return read_sum(words, self.asked().scale(self.holder.plan.most_tokens(1)))


def train(holder: DataHolder, **changes: Any) -> TrainRequest:
    return train_request(holder, *NAMES, **changes)


def stranger(name: str) -> Party:
    return Party(name, public_of(new_run_key()))


@pytest.mark.parametrize("lost", [[], ["cleo"]])
def test_the_sum_opens_to_the_weighted_mean(lost: list[str], open_node: Callable) -> None:
    server = Server(open_node())
    content = server.train()
    assert set(content) == {"clients", "masked", "boxes", "commitments"}  # and no number of anybody's
    answered = [name for name in NAMES if name not in lost]
    found = server.read(server.open(server.masked(content), answered))
    layout = server.holder.engine.layout
    plain = [one for one in train_clients(server.holder, train(server.holder)) if one.client_id in answered]
    weights = [one.weight for one in plain]
    mean = sum(one.weight * part_of(layout, one.delta, "b").double() for one in plain) / sum(weights)
    assert float(mean.abs().max()) > 1e-3
    np.testing.assert_allclose(found.mean, mean.numpy(), atol=1e-5 * LARGEST)
    assert found.weight == pytest.approx(sum(weights), rel=1e-5)
    assert found.num_tokens == sum(one.num_tokens for one in plain)
    losses = sum(one.num_tokens * one.train_loss for one in plain)
    assert found.loss == pytest.approx(losses / found.num_tokens, rel=1e-3)


def test_a_node_may_sum_its_clients_first(open_node: Callable) -> None:
    server = Server(open_node(**{"wire.node-sum": True}))
    others = [stranger("zoe"), stranger("yan")]
    content = server.train(server.asked(*others, num_clients=9))
    assert set(content["masked"]) == {"anna"}
    assert content["clients"]["ids"] == list(NAMES)


def test_no_client_weighs_more_than_it_is_asked_to(open_node: Callable) -> None:
    server = Server(open_node(), weight_cap=6.0)
    found = server.read(server.open(server.masked(server.train()), NAMES))
    rows = [client.num_rows for client in server.holder.clients.values()]
    assert min(rows) < 6 < max(rows)
    assert found.weight == pytest.approx(sum(min(6, number) for number in rows), rel=1e-5)


def test_a_known_update_is_not_found_in_what_leaves(
    open_node: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client whose delta is a known pattern; the plain codec, as the control, gives it away."""
    holder, honest = open_node(), protect.protect
    layout = holder.engine.layout
    pattern = torch.linspace(-0.09, 0.09, layout.size)

    def known(result: Any, *rest: Any, **options: Any) -> ClientUpdate:
        return replace(honest(result, *rest, **options), delta=pattern)

    monkeypatch.setattr(protect, "protect", known)
    server = Server(holder)
    content = server.train()
    plain = replies.write_updates(
        train_clients(holder, train(holder)), layout=layout, part="b", payload="fp32"
    )
    values = part_of(layout, pattern, "b")
    words = np.round(values.double().numpy() / server.asked().scale(1).step).astype(np.int64)
    pieces = [values.numpy()[place : place + 2].tobytes() for place in range(0, len(values), 2)]
    octets = words.astype("<u4").tobytes()  # as the ring would have them without masks
    pieces += [b"".join(octets[at : at + 3] for at in (place, place + 4)) for place in range(0, 400, 4)]

    def found(sent: RecordDict) -> int:
        data = [array.data for record in sent.array_records.values() for array in record.values()]
        return sum(any(piece in one for one in data) for piece in pieces)

    assert found(plain) == len(values) // 2
    assert found(content) == 0
    # Nor do equal updates look alike, and what the server sees is no different from chance.
    sent = [np.frombuffer(array.data, np.uint8) for array in content["masked"].values()]
    assert len({one.tobytes() for one in sent}) == len(NAMES)
    counts = np.bincount(np.concatenate(sent), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 degrees: beyond by chance 1 in 10^7
    assert np.allclose(server.read(server.open(server.masked(content), NAMES)).mean, values, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"largest": 1e-9}, {"weight_cap": 1e9}, {"num_clients": 9}, {"adapter": 0.5}, {"round_num": 3}],
)
def test_who_tells_the_others_other_terms_learns_nothing(
    changes: dict[str, Any], open_node: Callable
) -> None:
    """Terms under which all others add nothing would make the sum the update of one."""
    server = Server(open_node())
    adapter = train(server.holder).adapter
    request = {name: value for name, value in changes.items() if name == "round_num"}
    if "adapter" in changes:
        request["adapter"] = replace(adapter, vector=adapter.vector + changes["adapter"])
    sums = {name: value for name, value in changes.items() if name not in ("round_num", "adapter")}
    answer = server.masked(server.train(server.asked(clients=NAMES[:1]), names=NAMES[:1]))
    others = server.train(server.asked(clients=NAMES[1:], **sums), names=NAMES[1:], **request)
    answer = replace(answer, hidden={**answer.hidden, **server.masked(others).hidden})
    with pytest.raises(SecureError):
        server.open(answer, NAMES)


def test_a_label_asked_again_has_the_same_answer(open_node: Callable) -> None:
    first, again = Server(open_node()), Server(open_node())  # as after a restart
    assert first.train() == again.train()


def test_another_vector_under_a_label_stays(open_node: Callable) -> None:
    server = Server(open_node())
    server.train()
    again = Server(open_node())
    moved = train(again.holder).adapter
    content = again.train(adapter=replace(moved, vector=moved.vector + 0.01))
    assert "masked" not in content
    assert content["clients"]["codes"] == ["mask-reuse"] * 4
    assert "masked" in replace(again, label=bytes(32)).train()


def test_one_list_of_answers_is_opened_for_a_label(open_node: Callable) -> None:
    server = Server(open_node())
    answer = server.masked(server.train())
    question = server.question(answer, NAMES)
    openings, _ = server.unmask(question)
    again = Server(open_node())
    assert again.unmask(question) == (openings, {})
    without = server.question(answer, NAMES[:3])
    assert again.unmask(without) == ({}, dict.fromkeys(NAMES[:3], "mask-reuse"))


@pytest.mark.parametrize(
    ("answered", "code"),
    [(NAMES[:2], "too-few-parties"), ((*NAMES[:3], "zoe"), "bad-mask")],
)
def test_what_hides_nobody_is_not_opened(answered: Sequence[str], code: str, open_node: Callable) -> None:
    server = Server(open_node())
    answer = server.masked(server.train())
    asked = replace(server.question(answer, NAMES), answered=tuple(answered))
    boxes = {name: list(asked.boxes[name][: len(answered)]) for name in NAMES[:2]}
    commitments = {name: list(asked.commitments[name][: len(answered)]) for name in NAMES[:2]}
    _, failed = server.unmask(replace(asked, boxes=boxes, commitments=commitments))
    assert failed == dict.fromkeys(NAMES[:2], code)
    assert server.unmask(server.question(answer, NAMES))[1] == {}  # the refusal has used up nothing


def test_what_was_never_masked_is_not_opened(open_node: Callable) -> None:
    server = Server(open_node())
    answer = server.masked(server.train())
    _, failed = server.unmask(replace(server.question(answer, NAMES), label=bytes(32)))
    assert set(failed.values()) == {"bad-mask"}


def test_a_name_that_a_server_makes_up_is_no_path(open_node: Callable) -> None:
    server, name = Server(open_node()), "../../outside"
    question = server.question(server.masked(server.train()), NAMES)
    boxes, commitments = ({name: parts["anna"]} for parts in (question.boxes, question.commitments))
    asked = replace(question, boxes=boxes, commitments=commitments)
    assert server.unmask(asked) == ({}, {name: "bad-parties"})
    with pytest.raises(BadPartiesError, match=r"no client '\.\./\.\./outside'"):
        server.train(server.asked(stranger(name), clients=(name,), num_clients=5), names=[name])
    assert not (server.holder.state_path / "outside").exists()


def test_parties_that_hide_nobody_are_refused(open_node: Callable) -> None:
    server = Server(open_node())
    good = server.told()
    renewed = tuple(replace(party, run_key=public_of(new_run_key())) for party in good.parties)
    for parties, error in (
        (good.parties[:3], BadPartiesError),  # dora is not among them
        ((*good.parties, good.parties[0]), BadPartiesError),
        (renewed, BadPartiesError),
    ):
        with pytest.raises(error):
            server.train(server.asked(exchange=Exchange(LABEL, parties), num_clients=5))
    few = server.asked(exchange=Exchange(LABEL, good.parties[:2]), clients=NAMES[:2])
    rest = server.asked(exchange=Exchange(bytes(32), good.parties[2:]), clients=NAMES[2:])
    with pytest.raises(TooFewPartiesError, match="at least 3 hide one another"):
        server.train(few, rest)
    for sums in ([few], [server.asked(), server.asked()]):  # in no sum, and in two
        with pytest.raises(BadPartiesError, match="each of its clients in one secret sum"):
            server.train(*sums)
    assert not list(run_keys(server.holder.state_path, server.holder.plan, "anna").folder.glob("*.masked"))


def test_a_plain_update_never_leaves_such_a_run(open_node: Callable) -> None:
    holder = open_node()
    content = requests.write_train_request(train(holder), requests.Sending())
    with pytest.raises(BadPartiesError, match="train at one rank"):
        Server(holder).train(ranks=dict.fromkeys(NAMES, 1))
    with pytest.raises(BadPartiesError):
        FOR_FEDLLM["train"](holder, content, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no client's own update leaves"):
        train_for_stock(holder, RecordDict({"arrays": content["adapter"]}))


def test_keys_of_a_run_end_with_it(open_node: Callable) -> None:
    server = Server(open_node())
    answer, before = server.masked(server.train()), server.parties
    over = masks.write_over(round_num=1, plan_digest=server.holder.plan.digest)
    assert not answer_unmask(server.holder, over)
    assert server.unmask(replace(server.question(answer, NAMES)))[1] == dict.fromkeys(NAMES, "bad-mask")
    assert not {party.run_key for party in before} & {party.run_key for party in server.parties}


def test_a_question_of_another_run_is_refused(open_node: Callable) -> None:
    with pytest.raises(OtherConfigError):
        answer_unmask(open_node(), masks.write_over(round_num=1, plan_digest="0" * 64))


# --- at a site ---------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function (peers) -> the key of this site, whose site.toml names these peers."""
    public = public_text(new_key(tmp_path / "site.key"))
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))

    def write(*peers: str, more: str = "") -> str:
        listed = "".join(f'p{place} = "{key}"\n' for place, key in enumerate(peers))
        table = f"[peers]\n{listed}" if peers else ""
        text = (
            f'[site]\nkey = "site.key"\nstate-path = "state"\n[allow]\nserver-paths = true\n{more}\n{table}'
        )
        (tmp_path / "site.toml").write_text(text)
        return public

    return write


def test_a_site_trusts_its_peers_and_itself_alone(
    site: Callable, open_node: Callable, tmp_path: Path
) -> None:
    other = public_text(new_key(tmp_path / "other"))
    own = site(other)
    server = Server(open_node(), identity=own)
    assert all(party.signature for party in server.parties)
    with pytest.raises(TooFewPartiesError, match="1 parties"):  # four clients of one site hide nobody
        server.train()
    with pytest.raises(BadPartiesError, match="party zoe is not signed by a site of"):
        server.train(server.asked(stranger("zoe"), num_clients=5))
    with pytest.raises(BadPartiesError, match="party anna is not signed"):  # a signature of another key
        replace(server, identity=other).train()
    site()
    assert "masked" in server.train()  # who names no peers trusts whom the server names


def test_a_site_may_want_more_parties(site: Callable, open_node: Callable) -> None:
    site(more="min-parties = 5")
    with pytest.raises(TooFewPartiesError, match="at least 5"):
        Server(open_node()).train()


@pytest.mark.parametrize("bundles", ["[]", '["ab"]'])
def test_a_site_tells_whether_it_pins_the_code(bundles: str, site: Callable, open_node: Callable) -> None:
    site(more=f"bundles = {bundles}")
    assert {client.is_pinned for client in declare_clients(open_node(), 1)} == {bundles != "[]"}


def test_a_value_that_is_not_finite_does_not_leave(
    open_node: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = protect.protect

    def broken(result: Any, *rest: Any, **options: Any) -> ClientUpdate:
        update = honest(result, *rest, **options)
        return replace(update, delta=update.delta * math.nan) if result.client_id == "ben" else update

    monkeypatch.setattr(protect, "protect", broken)
    content = Server(open_node()).train()
    assert dict(zip(content["clients"]["ids"], content["clients"]["codes"], strict=True))["ben"] == (
        SecureError.code
    )
    assert set(content["masked"]) == set(NAMES) - {"ben"}
