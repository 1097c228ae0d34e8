"""The hostile server: what a data holder's site.toml refuses, whoever asks and however it is asked."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from clients.gate import Sender
from clients.process import Process
from fedllm import chained_log
from fedllm.identity import new_key, public_text
from fedllm.messages import ClientEvaluation, ClientFailure
from fedllm.models.files import content_digest, fingerprint
from fedllm.site_policy import load_policy
from fedllm.wire import joining, replies, requests
from fedllm.wire.leaving import fields_that_leave
from fedllm.wire.masks import write_over
from scripts.runtimes.local import init, step
from tests.builders import train_request

SALT = bytes(16)
AT_HOME = {"personal.mode": "finetune", "personal.steps": 2}
MASKS = {"secure.method": "masks", "federation.num-clients": 3}
DISTILS = {"distill.when": "every", "distill.text": "synthetic"}
NUM_ROWS = 40


def answered(reply: Any) -> bool:
    return isinstance(reply, RecordDict)


def entries() -> list[dict[str, Any]]:
    return list(chained_log.read_entries(load_policy().state_folder / "log.jsonl"))


def test_an_empty_file_limits_nothing_and_logs_all(hostile: Callable) -> None:
    server = hostile(**DISTILS, **AT_HOME)
    asked = [server.join(), server.train(), server.evaluate(), server.overlap(), server.adapt()]
    asked.append(server.stock("train"))
    assert all(map(answered, asked))
    told = fields_that_leave()
    kinds = ("join", "train", "evaluate", "overlap", "adapt")
    for kind, reply in zip(kinds, asked[:5], strict=True):
        names = {f"{name}.{field}" for name, record in reply.items() for field in record}
        assert {name.replace(".ward", ".CLIENT") for name in names} <= set(told[kind])
    chained_log.verify(load_policy().state_folder / "log.jsonl")
    assert [entry["question"] for entry in entries()] == [*kinds, "stock train"]
    assert {entry["code"] for entry in entries()} == {"ok"}
    assert all(len(entry["answer"]) == 64 for entry in entries())
    assert [entry["bytes"] > 0 for entry in entries()] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    ("limits", "keys", "named"),
    [
        ("[limits]\nsteps = 8", {"train.local-steps": 1_000_000}, "steps = 8, and the run asks for 1000000"),
        ("[limits]\nsteps = 8", {"personal.mode": "dual", "personal.steps": 9}, "steps = 8"),
        ("[limits]\nrank = 4", {"personal.mode": "dual:rank=5"}, "rank = 4"),
        ("[limits]\nrun-steps = 8", {"federation.num-rounds": 1_000_000}, "run-steps = 8"),
        ("[limits]\nrounds = 5", {"federation.num-rounds": 6}, "rounds = 5"),
        ("[limits]\nrank = 4", {"lora.rank": 8}, "rank = 4"),
        ("[limits]\ntrain-rows = 16", {}, "train-rows = 16, and a round trains on 4"),
        ('[allow]\npurposes = ["triage"]', {}, "purposes does not name run.purpose = ''"),
        ('[allow]\nservers = ["fl.example.org:443"]', {}, "servers does not name whoever asks a bare node"),
        ('[allow]\nbundles = ["ab"]', {}, "bundles does not name"),
    ],
)
def test_a_run_beyond_the_policy_is_refused_at_once(
    limits: str, keys: dict[str, Any], named: str, site: Callable, hostile: Callable, caplog: Any
) -> None:
    site(limits)
    assert hostile(**keys).join() == "policy"
    assert named in caplog.text
    assert [(entry["question"], entry["code"], entry["bytes"]) for entry in entries()] == [
        ("join", "policy", 0)
    ]


def test_where_secret_sums_are_required_no_plain_update_leaves(
    site: Callable, hostile: Callable, tmp_path: Path, caplog: Any
) -> None:
    key = public_text(new_key(tmp_path / "site.key"))
    site(
        f'key = "site.key"\n[allow]\nsecure-aggregation = "required"\nbundles = ["ab"]\n[peers]\na = "{key}"'
    )
    sender = Sender(server="fl:1", node="ward", bundle="ab")
    plain = hostile(sender)
    asked = [plain.join(), plain.train(), plain.evaluate(), plain.stock("train"), plain.unmask()]
    assert asked == ["policy"] * 5
    assert "[allow] secure-aggregation = 'required', and the run's secure.method is 'none'" in caplog.text
    assert hostile(sender, **{**MASKS, "secure.method": "he"}).join() == "policy", "a server may lie"
    server = hostile(sender, **MASKS)
    joined = server.reply("query.join", joining.write_question("0" * 32))
    assert (len(joined["secure"]["signatures"][0]), joined["secure"]["pinned"]) == (64, True)
    assert answered(server.evaluate())
    assert [server.train(), server.stock("train")] == [
        "bad-parties",
        "bad-config",
    ]  # without the sum's parties
    assert server.unmask() == "bad-packet"


def test_unmasking_is_a_question_of_its_own(site: Callable, hostile: Callable) -> None:
    site('[allow]\nmessages = ["join", "train"]')
    assert hostile(**MASKS).unmask() == "policy"
    site("")
    assert hostile().unmask() == "bad-config"  # nothing is masked in this run
    server = hostile(**MASKS)
    over = write_over(round_num=1, plan_digest=server.holder().plan.digest)
    assert not server.reply("query.unmask", over)
    assert [entry["question"] for entry in entries()] == ["unmask"] * 3


def test_only_an_allowed_server_and_bundle_are_answered(site: Callable, hostile: Callable) -> None:
    site('[allow]\nservers = ["fl:1"]\nbundles = ["sha256:AB"]')
    good = Sender(server="fl:1", node="ward", bundle="ab")
    assert answered(hostile(good).join())
    assert hostile(replace(good, server="other:1")).join() == "policy"
    assert hostile(replace(good, bundle="cd")).join() == "policy"
    assert entries()[0] | vars(good) == entries()[0]


def test_only_the_kinds_of_question_that_are_named(site: Callable, hostile: Callable) -> None:
    site('[allow]\nmessages = ["join", "train"]')
    server = hostile(**DISTILS)
    assert answered(server.join())
    assert answered(server.train())
    asked = [server.evaluate(), server.overlap(), server.stock("train"), server.stock("evaluate")]
    assert [*asked, hostile(**AT_HOME).adapt()] == ["policy"] * 5


def test_losses_of_one_row_at_a_time_come_to_an_end(site: Callable, hostile: Callable) -> None:
    """F1: 300 questions, each run with a seed of its own, which chose the one row that is held out."""
    site("[limits]\nheld-out-rows = 4\nevaluations = 20")
    told = []
    for seed in range(15):
        server = hostile(**{"seed": seed, "data.max-held-out": 1})
        told.append(server.evaluate())
    told += [server.evaluate() for _ in range(285)]
    losses = {
        one.loss
        for reply in told[:20]
        for one in replies.read_evaluations(reply, most=1)
        if isinstance(one, ClientEvaluation)
    }
    assert len(losses) == 1  # of the same four rows, whatever the run says
    assert told[20:] == ["query-limit"] * 280
    asked = [entry["code"] for entry in entries()]
    assert (asked.count("ok"), asked.count("query-limit")) == (20, 280)
    site("[limits]\nheld-out-rows = 5")
    (one,) = replies.read_evaluations(hostile(seed=99).evaluate(), most=1)
    assert isinstance(one, ClientFailure)
    assert one.code == "no-data"


def test_losses_in_train_answers_count_as_evaluations(site: Callable, hostile: Callable) -> None:
    site("[limits]\nevaluations = 1")
    server = hostile()
    request = train_request(server.holder(), "ward")
    content = requests.write_train_request(request, requests.Sending())
    content["request"]["evaluate"] = True
    codes = [server.reply("train", content) for _ in range(2)]
    assert (answered(codes[0]), codes[1]) == (True, "query-limit")
    site('[allow]\nmessages = ["train"]')
    assert server.reply("train", content) == "policy"


def test_training_at_home_counts_as_evaluation_and_by_its_steps(site: Callable, hostile: Callable) -> None:
    server = hostile(**AT_HOME, **{"federation.num-rounds": 1})
    site("[limits]\nevaluations = 1")
    assert [answered(server.adapt()), server.adapt()] == [True, "query-limit"]
    site("[limits]\nrun-steps = 15")  # six for each answer: two at home, and for the control two and two
    assert [answered(server.adapt()), server.adapt()] == [True, "policy"]
    site("[limits]\nsteps = 5")
    assert [answered(server.join()), server.adapt()] == [True, "policy"]
    site("[limits]\ntokens = 1")
    assert server.adapt() == "policy"


def test_a_run_without_training_at_home_gets_none(hostile: Callable, caplog: Any) -> None:
    assert hostile().adapt() == "bad-config"
    assert "personal.mode is not 'finetune'" in caplog.text


def test_another_name_of_a_run_counts_as_a_run(site: Callable, hostile: Callable) -> None:
    site("[limits]\nruns = 3")
    names = [hostile(**{"run.name": f"run-{number}"}) for number in range(12)]
    assert [answered(server.join()) for server in names] == [True] * 3 + [False] * 9
    assert answered(names[0].train())  # one that has begun goes on
    assert names[-1].join() == "policy"


def test_runs_whose_rows_cannot_be_opened_count_too(site: Callable, hostile: Callable) -> None:
    """Whether they can be, under columns of the server's choice, tells of them."""
    site("[limits]\nruns = 2")
    names = [hostile(**{"data.columns": f"text=guess-{number}"}) for number in range(4)]
    assert [server.join() for server in names][2:] == ["policy"] * 2
    assert hostile().join() == "policy"


def test_a_run_trains_no_more_often_than_permitted(site: Callable, hostile: Callable) -> None:
    """The same round again counts too, and a new process starts no new count."""
    site("[limits]\nrounds = 3\n")
    server = hostile()
    assert all(answered(server.train()) for _ in range(3))
    assert replace(server, process=Process()).train() == "policy"
    site("[limits]\nrun-steps = 7\n")
    assert server.train() == "policy"  # the fourth time two steps


def test_tokens_of_one_answer_are_bounded(site: Callable, hostile: Callable) -> None:
    server = hostile()
    client = server.holder().clients["ward"]
    most = 4 * max(len(row.tokens) for row in client.train)
    measured = sum(len(row.tokens) for row in client.held_out)
    site(f"[limits]\ntokens = {most}")
    assert answered(server.train())
    site(f"[limits]\ntokens = {most - 1}")
    assert server.train() == "policy"
    assert server.stock("train") == "policy"
    site(f"[limits]\ntokens = {measured - 1}")
    assert server.evaluate() == "policy"


def test_an_answer_that_takes_too_long_is_ended(site: Callable, hostile: Callable) -> None:
    site("[limits]\nseconds = 1e-9")
    server = hostile()
    assert [server.train(), server.evaluate(), server.stock("train")] == ["policy"] * 3
    site("[limits]\nseconds = 3600")
    assert answered(server.train())


def test_a_dictionary_of_rows_is_not_answered(site: Callable, hostile: Callable) -> None:
    """F8: 20 of 20 rows told in one question, with distillation off and no round run."""
    site("[limits]\noverlaps = 2")
    rows = [row.tokens for row in hostile().holder().clients["ward"].train[:20]]
    assert hostile().overlap(*rows) == "policy"  # the run does not distil
    assert hostile(**{"distill.when": "every", "distill.text": "docstrings"}).overlap(*rows) == "policy"
    assert hostile(**{"distill.when": "last"}).overlap(*rows) == "policy"  # not in this round
    server = hostile(**DISTILS)
    assert server.overlap(*rows) == "query-limit"  # no round has been trained
    assert server.train(round_num=1, drawn={"who": 0}, ranks={"who": 2}) != "policy"  # nor by this
    assert server.overlap(*rows) == "query-limit"
    server.train()
    assert answered(server.overlap(*rows))
    assert server.overlap(*rows, round_num=2) == "query-limit"  # one for each round trained
    other = hostile(**DISTILS, **{"run.name": "other"})
    other.train()
    assert answered(other.overlap(*rows))
    third = hostile(**DISTILS, **{"run.name": "third"})
    third.train()
    assert third.overlap(*rows) == "query-limit"  # over all runs


def test_where_no_exact_number_leaves_none_does(site: Callable, hostile: Callable) -> None:
    site("[allow]\nexact-numbers = false")
    server = hostile(**DISTILS)
    (joined,) = joining.read_joined(server.join(), 2, most=8)
    assert (joined.num_train, joined.num_held_out) == (32, 4)
    content = server.train()
    metrics = dict(content["metrics"])
    assert metrics.pop("weight") == [32.0]
    assert set(map(tuple, metrics.values())) == {(0.0,)}
    (told,) = replies.read_evaluations(server.evaluate(), most=1)
    assert told.loss == round(told.loss, 1)
    assert told.num_rows == 4
    assert told.num_tokens & (told.num_tokens - 1) == 0
    assert server.overlap() == "withheld"


def test_a_run_whose_sites_withhold_numbers_has_no_train_loss(
    site: Callable, write_rows: Callable, make_config: Callable, tmp_path: Path
) -> None:
    site("[allow]\nexact-numbers = false")
    config = make_config(write_rows("rows.jsonl", {"anna": 9, "ben": 5}), **{"run.output": str(tmp_path)})
    after, record = step(init(config))
    assert record.training.loss is None
    assert record.weights == {"anna": 8.0, "ben": 4.0}
    assert after.adapter.vector.any()


def test_few_rows_are_neither_trained_on_nor_measured(site: Callable, hostile: Callable) -> None:
    site("[limits]\nheld-out-rows = 5\ntrain-rows = 4")
    (joined,) = joining.read_joined(hostile().join(), 2, most=8)
    assert (joined.num_train, joined.num_held_out) == (36, 0)
    (told,) = replies.read_evaluations(hostile().evaluate(), most=1)
    assert told.code == "no-data"
    site("[limits]\ntrain-rows = 37")
    (joined,) = joining.read_joined(hostile(**{"train.local-steps": 20}).join(), 2, most=8)
    assert joined.num_train == 0


def test_a_model_is_known_by_its_content(
    site: Callable, hostile: Callable, make_model_folder: Callable, tmp_path: Path, caplog: Any
) -> None:
    """F9: the fingerprint samples the weights, so a crafted model may share it; the full hash is its own."""
    crafted = tmp_path / "crafted"
    shutil.copytree(make_model_folder(), crafted)
    with (crafted / "model.safetensors").open("r+b") as weights:
        weights.seek(8 + int.from_bytes(weights.read(8), "little") + 20_000)  # within the embedding
        weights.write(bytes(4))
    assert fingerprint(crafted) == fingerprint(make_model_folder())
    site(f'[allow]\nmodels = ["sha256:{content_digest(make_model_folder())}"]')
    server = hostile()
    assert answered(server.join())
    other = replace(server, node={**server.node, "model-path": str(crafted)})
    assert other.join() == "policy"
    assert f"sha256:{content_digest(crafted)}" in caplog.text
    (crafted / "config.json").write_text(
        json.dumps({**json.loads((crafted / "config.json").read_text()), "_name_or_path": "org/trusted"})
    )
    assert other.join() == "policy"


def test_a_model_by_name_is_not_fetched_where_models_are_listed(site: Callable, hostile: Callable) -> None:
    site('[allow]\nmodels = ["sha256:ab"]')
    server = hostile(**{"model.name": "org/of-theirs"})
    assert replace(server, node={"data-path": server.node["data-path"]}).join() == "bad-model"


def test_what_cannot_be_logged_or_counted_does_not_leave(site: Callable, hostile: Callable) -> None:
    server = hostile()
    assert answered(server.train())
    state = load_policy().state_folder
    (count,) = (state / "asked").glob("*.json")
    count.write_text("{}")
    assert server.train() == "checkpoint"
    count.unlink()
    (state / "log.jsonl").unlink()
    (state / "log.jsonl").mkdir()
    assert server.train() == "checkpoint"


def test_a_number_out_of_range_is_no_mistake_of_ours(hostile: Callable) -> None:
    """It is refused by a code of its own, or has no effect; and it costs neither time nor memory."""
    server = hostile()
    values: dict[str, list[Any]] = {
        "round": [-1, 2**62],
        "num-drawn": [[-1], [2**63 - 1]],
        "ranks": [[0], [10**9]],
        "clip": [float("nan"), -1.0],
        "client-ids": [[], ["ward", "ward"]],
        "base-delta-ranks": [[10**9]],
        "part": ["a" * 100_000],
    }
    for field, value in ((field, value) for field, found in values.items() for value in found):
        content = requests.write_train_request(train_request(server.holder(), "ward"), requests.Sending())
        content["request"][field] = value
        reply = server.reply("train", content)
        assert answered(reply) or reply in ("bad-packet", "wrong-layout"), (field, value)


def test_a_policy_that_changes_holds_for_what_is_open(site: Callable, hostile: Callable) -> None:
    server = hostile()
    assert answered(server.train())
    site("[budget]\nepsilon = 1.0")
    assert server.join() == "policy"
    site("[limits]\ntrain-rows = 37")
    (joined,) = joining.read_joined(hostile(**{"train.local-steps": 20}).join(), 2, most=8)
    assert joined.num_train == 0
    site("")
    assert answered(server.train())


def test_a_policy_that_cannot_be_read_answers_nothing(site: Callable, hostile: Callable) -> None:
    server = hostile()
    server.holder()  # opened while the policy was whole
    site("[limits]\nstep = 1")
    assert server.join() == "bad-config"
