import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from clients.data_holder import DataHolder
from clients.evaluate import evaluate_clients
from clients.jobs import make_job
from clients.join import declare_clients
from clients.process import NUM_HOLDERS, Process
from clients.techniques import plan_node_round
from clients.tokens import hosted_rows
from clients.train import train_clients
from fedllm.config.run_config import RunConfig
from fedllm.engine.jobs import EvaluationJob, Job
from fedllm.errors import ConfigError, DataError, ModelError, PolicyError
from fedllm.messages import ClientFailure, ClientUpdate
from fedllm.plan.run_plan import resolve
from tests.builders import evaluate_request, train_request

SERVED = {"server-paths": True}


def holder_of(config: RunConfig, **node: Any) -> DataHolder:
    return Process().open(config.to_flat(), node)


SERVER_NAMED = [
    "{file}",
    "{folder}",
    "{folder}/*.jsonl",
    "rows.jsonl",
    "./rows",
    "~/rows",
    "a.csv,b.csv",
    "/etc",
]
NOT_PERMITTING = [{}, {"server-paths": False}, {"server-paths": "false"}, {"server-paths": 1}]


@pytest.mark.parametrize("source", SERVER_NAMED)
@pytest.mark.parametrize("node", NOT_PERMITTING)
def test_a_data_path_that_a_server_names_is_not_opened(
    source: str, node: dict[str, Any], write_rows: Callable, make_config: Callable
) -> None:
    file = write_rows("rows.jsonl", {"anna": 3})
    config = make_config(source.format(file=file, folder=file.parent))
    with pytest.raises(DataError, match="does not open paths a server names"):
        holder_of(config, **node)


@pytest.mark.parametrize("name", ["{model}", "./model", "~/model", "a/b/c", "some/model.gguf"])
@pytest.mark.parametrize("node", NOT_PERMITTING)
def test_a_model_path_that_a_server_names_is_not_opened(
    name: str, node: dict[str, Any], write_rows: Callable, make_config: Callable
) -> None:
    config = make_config()
    named = config.override({"model.name": name.format(model=config.model.name)})
    own = {"data-path": str(write_rows("own.jsonl", {"x": 3}))}
    for given in ({}, own):
        with pytest.raises(ModelError, match="does not open paths a server names"):
            holder_of(named, **node, **given)


def test_named_path_is_opened_where_node_or_policy_permits(
    write_rows: Callable, make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 4}))
    assert list(holder_of(config, **{"server-paths": True}).clients) == ["anna", "ben"]
    policy = tmp_path / "site.toml"
    policy.write_text("[allow]\nserver-paths = true")
    monkeypatch.setenv("FEDLLM_SITE", str(policy))
    assert list(holder_of(config).clients) == ["anna", "ben"]
    for root, is_permitted in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        policy.write_text(f"[allow]\nserver-paths = true\n[site]\ndata-root = {str(root)!r}")
        with nullcontext() if is_permitted else pytest.raises(PolicyError, match="leads out of"):
            holder_of(config)


@pytest.mark.parametrize("num_partitions", [1, 2, 3, 7])
def test_every_client_is_hosted_by_exactly_one_partition(
    num_partitions: int, write_rows: Callable, make_config: Callable
) -> None:
    names = [f"c{number}" for number in range(5)]
    config = make_config(write_rows("rows.jsonl", dict.fromkeys(names, 3)), **{"federation.num-clients": 5})
    hosted = [
        rows.client_id
        for partition in range(num_partitions)
        for rows in hosted_rows(
            config, {"partition-id": partition, "num-partitions": num_partitions, "server-paths": True}
        )
    ]
    assert sorted(hosted) == names


def test_node_with_its_own_file_is_one_client(write_rows: Callable, make_config: Callable) -> None:
    own = write_rows("own.jsonl", {"x": 3, "y": 4})
    for source in ("docstrings", "/etc/passwd", str(write_rows("other.jsonl", {"anna": 9}))):
        (rows,) = hosted_rows(make_config(source), {"data-path": str(own), "client-id": "ward-7"})
        assert rows.client_id == "ward-7"
        assert len(rows.train) + len(rows.held_out) == 7
    (rows,) = hosted_rows(make_config(), {"data-path": str(own), "partition-id": 3})
    assert rows.client_id == "client-0003"


@pytest.mark.parametrize("content", ["", "\n\n", '{"instruction": "a", "output": ""}\n', "not JSON\n"])
def test_a_client_without_usable_rows_declares_none(
    content: str, tmp_path: Path, make_config: Callable
) -> None:
    (tmp_path / "empty.jsonl").write_text(content)
    node = {"data-path": str(tmp_path / "empty.jsonl"), "client-id": "ward-7", "server-paths": True}
    holder = holder_of(make_config(), **node)
    (joined,) = declare_clients(holder, 5)
    assert (joined.client_id, joined.node_id, joined.num_train, joined.num_held_out) == ("ward-7", 5, 0, 0)
    assert joined.fingerprint == holder.fingerprint
    (answer,) = train_clients(holder, train_request(holder, "ward-7"))
    assert isinstance(answer, ClientFailure)
    assert answer.code == "no-data"


@pytest.mark.parametrize("client_id", ["", "a  b", "a ", "x" * 65, "../x", "a/b", "anna\n", "-x", "a\u202eb"])
def test_a_client_names_itself_by_a_printable_name(
    client_id: str, write_rows: Callable, make_config: Callable
) -> None:
    own = str(write_rows("own.jsonl", {"x": 3}))
    with pytest.raises(ConfigError, match="client-id"):
        hosted_rows(make_config(), {"data-path": own, "client-id": client_id})


def test_absent_file_is_an_error_and_no_empty_client(tmp_path: Path, make_config: Callable) -> None:
    with pytest.raises(DataError, match="no such file"):
        hosted_rows(make_config(), {"data-path": str(tmp_path / "absent.jsonl")})


@pytest.fixture
def holder(write_rows: Callable, make_config: Callable) -> DataHolder:
    return holder_of(make_config(write_rows("rows.jsonl", {"anna": 8, "ben": 3})), **{"server-paths": True})


def test_clients_declare_rows_to_train_on_and_kept_back(holder: DataHolder) -> None:
    joined = {
        client.client_id: (client.num_train, client.num_held_out) for client in declare_clients(holder, 1)
    }
    assert joined == {"anna": (7, 1), "ben": (2, 1)}


def test_rows_whose_answer_is_cut_off_are_left_out(write_rows: Callable, make_config: Callable) -> None:
    file = write_rows("rows.jsonl", {"anna": 8, "ben": 3}, secret="word " * 9)
    short = holder_of(make_config(file, **{"train.max-length": 8}), **{"server-paths": True})
    assert {client.num_train for client in declare_clients(short, 1)} == {0}
    with_room = holder_of(make_config(file, **{"train.max-length": 70}), **{"server-paths": True})
    rows = [row for client in with_room.clients.values() for row in client.train]
    assert rows
    assert all(len(row.tokens) <= 70 and row.num_supervised for row in rows)


def test_a_client_that_loses_too_many_rows_declares_why(
    write_rows: Callable, make_config: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_rows("rows.jsonl", {"anna": 8, "ben": 4})
    long = {"instruction": "word " * 60, "output": "Return 1.", "client": "ben"}
    file.write_text(file.read_text() + f"{json.dumps(long)}\n" * 2)
    holder = holder_of(make_config(file), **{"server-paths": True})
    joined = {client.client_id: (client.num_train, client.cause) for client in declare_clients(holder, 1)}
    assert joined == {"anna": (7, ""), "ben": (0, "rows-lost")}
    assert "client ben: 2 of 6 rows are skipped: 2 rows lose their whole answer" in caplog.text
    assert "word" not in caplog.text
    few = holder_of(make_config(file, **{"federation.num-clients": 1, "data.partition": "iid"}), **SERVED)
    (client,) = declare_clients(few, 1)
    assert (client.cause, few.counts[client.client_id].num_lost) == ("", 2)  # 2 of 14


def test_bad_rows_and_cut_rows_of_an_own_file_count_together(
    make_config: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps({"prompt": f"q{number}", "response": "an answer"}) for number in range(10)]
    long = json.dumps({"prompt": "word " * 300, "response": "an answer"})
    file, causes = tmp_path / "rows.jsonl", {}
    for bad, cut in ((2, 0), (0, 2), (2, 2)):  # of 12, 12 and 14
        file.write_text(
            "\n".join([*good, *["{"] * bad, *[long.replace("word", f"word{n}") for n in range(cut)]])
        )
        holder = holder_of(make_config(file), **SERVED, **{"data-path": str(file)})
        causes[bad, cut] = declare_clients(holder, 1)[0].cause
    assert causes == {(2, 0): "", (0, 2): "", (2, 2): "rows-lost"}
    assert "4 of 14 rows are skipped: 2 rows are bad; 2 rows lose their whole answer" in caplog.text


def test_tokenizer_without_embeddings_is_refused_on_opening(
    write_rows: Callable, make_config: Callable, tmp_path: Path
) -> None:
    config = make_config(write_rows("rows.jsonl", {"anna": 8, "ben": 3}))
    shutil.copytree(config.model.name, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    tokenizer.add_tokens(["anna"])
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="embedding"):
        holder_of(config.override({"model.name": str(tmp_path / "model")}), **SERVED)


def job_of(holder: DataHolder, client: str, drawn: int = 0, *others: str, **training: Any) -> Job:
    request = train_request(holder, *others, client)
    this_round = plan_node_round(holder, request)
    this_round = replace(this_round, training=replace(this_round.training, **training))
    return make_job(this_round, holder.clients[client], drawn, rank=2, start_P=request.adapter.vector)


def test_a_client_draws_on_from_the_rows_it_has_drawn(holder: DataHolder) -> None:
    rounds = [job_of(holder, "anna", drawn) for drawn in range(0, 28, 4)]
    seen = Counter(row for job in rounds for batch in job.batches for row in batch)
    assert set(seen.values()) == {4}  # 7 rounds of 4 rows over 7 rows
    assert len(seen) == 7
    for job in rounds:
        assert [len(batch) for batch in job.batches] == [2, 2]
    longer = job_of(holder, "anna", steps=4)
    assert longer.batches == rounds[0].batches + rounds[1].batches


@pytest.mark.soak
def test_a_client_draws_the_same_rows_in_whatever_company(
    holder: DataHolder, write_rows: Callable, make_config: Callable
) -> None:
    assert job_of(holder, "ben", 4, "anna").batches == job_of(holder, "ben", 4).batches
    config = make_config(write_rows("rows.jsonl", {"anna": 8, "ben": 3}), seed=1)
    other_seed = holder_of(config, **{"server-paths": True})
    assert job_of(other_seed, "anna").batches != job_of(holder, "anna").batches


def test_answers_come_in_order_and_strangers_have_no_data(holder: DataHolder) -> None:
    answers = train_clients(holder, train_request(holder, "ben", "stranger", "anna"))
    assert [answer.client_id for answer in answers] == ["ben", "stranger", "anna"]
    ben, stranger, anna = answers
    assert isinstance(ben, ClientUpdate)
    assert isinstance(anna, ClientUpdate)
    assert (ben.weight, anna.weight) == (2.0, 7.0)
    assert isinstance(stranger, ClientFailure)
    assert stranger.code == "no-data"


def test_a_diverged_client_reports_only_that(write_rows: Callable, make_config: Callable) -> None:
    config = make_config(write_rows("rows.jsonl", {"anna": 8, "ben": 3}), **{"train.learning-rate": 1e30})
    wild = holder_of(config, **{"server-paths": True})
    for answer in train_clients(wild, train_request(wild, "anna", "ben")):
        assert answer == ClientFailure(client_id=answer.client_id, code="non-finite")


def test_an_evaluation_covers_the_rows_kept_back(holder: DataHolder) -> None:
    asked = evaluate_request(holder, "ben", "x")
    ben, stranger = evaluate_clients(holder, asked)
    job = EvaluationJob("ben", asked.adapter.vector, holder.clients["ben"].held_out)
    assert [ben] == holder.engine.evaluate([job])
    assert isinstance(stranger, ClientFailure)


def test_a_nodes_own_model_path_leaves_the_runs_digest(write_rows: Callable, make_config: Callable) -> None:
    config = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 3}))
    named = config.override({"model.name": "org/model@main"})
    node = {"server-paths": True, "model-path": config.model.name}
    holder = holder_of(named, **node)
    assert holder.plan.digest == resolve(named).digest
    assert holder.plan.config.model.name == config.model.name


def test_a_holder_is_opened_once_a_process(write_rows: Callable, make_config: Callable) -> None:
    config, process = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 3})), Process()
    node = {"server-paths": True}
    first = process.open(config.to_flat(), node)
    assert process.open(config.to_flat(), node) is first
    assert process.open(config.override({"seed": 9}).to_flat(), node) is not first
    assert Process().open(config.to_flat(), node) is not first


def test_a_source_is_read_once_for_all_nodes(write_rows: Callable, make_config: Callable) -> None:
    config, process = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 3})), Process()
    first = process.read_source(config)
    assert process.read_source(config.override({"train.local-steps": 9})) is first
    assert process.read_source(config.override({"seed": 9})) is not first


def test_only_so_many_holders_stay_open(write_rows: Callable, make_config: Callable) -> None:
    config, process = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 3})), Process()
    for number in range(NUM_HOLDERS + 1):
        process.open(config.to_flat(), {"server-paths": True, "partition-id": 0, "number": number})
    assert len(process.holders) == NUM_HOLDERS


def test_holders_of_one_run_alone_stay_open(write_rows: Callable, make_config: Callable) -> None:
    """A holder keeps its base model in memory, so those of an earlier run would keep theirs as well."""
    config, process = make_config(write_rows("rows.jsonl", {"anna": 3, "ben": 3})), Process()
    for number in range(3):
        process.open(config.to_flat(), {"server-paths": True, "number": number})
    last = process.open(config.override({"seed": 9}).to_flat(), {"server-paths": True})
    assert list(process.holders.values()) == [last]
