"""The distillation step beside the round loop: what it keeps, what it refuses, what it leaves as it was."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg
from transformers import AutoModelForCausalLM

from clients.client_app import app
from fedllm.adapters.layout import AdapterState, at_rank, with_rank
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example, Turn
from fedllm.errors import ConfigError, DataError, NoDataError
from fedllm.messages import ClientUpdate
from fedllm.models.chat import Encoded, encode
from fedllm.originality.verdict import Verdict
from fedllm.plan.run_plan import distillation_of, resolve
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import (
    DistillationLosses,
    DistillationRecord,
    LossChange,
    RoundRecord,
)
from fedllm.wire.stock import read_plain, write_plain
from scripts.runtimes.local import local_grid
from strategies.distillation.gate import Loss, ask_clients, error_of_gain, judged
from strategies.distillation.material import make_material
from strategies.distillation.report import describe_step, table_cell
from strategies.distillation.step import distilled, server_engine
from strategies.distillation.synthetic_text import Gates
from strategies.distillation.teachers import ClientAdapter, Teachers, priors_of
from strategies.flower_strategy import FederatedLora
from strategies.rounds import next_round
from strategies.run import open_session, run_federation
from strategies.session import Watch

FORMS = {
    "anna": "Return the {} of a {}.",
    "ben": "open every {} near my {}!",
    "cleo": "NEVER SORT {} BEFORE {}",
    "dora": "(raise) {} => {} (fails)",
}
NAMES = tuple(FORMS)
WORDS = ("sum", "list", "file", "value", "error", "string", "number", "line", "index", "key", "name", "order")

CHEAP = {
    "distill.when": "every",
    "distill.num-texts": 24,
    "distill.max-tokens": 48,
    "distill.steps": 20,
    "distill.batch-size": 4,
    "distill.learning-rate": 0.005,
    "distill.top-k": 64,
    "distill.gate": "public",
    "distill.originality": "off",  # so few words make every sentence one that somebody has
}
FEW = {"distill.num-texts": 8, "distill.steps": 3, "train.local-steps": 4}
PRIVATE = {
    "privacy.epsilon": 8.0,
    "privacy.unit": "client",
    "privacy.trust": "local",
    "aggregation.read-out": "factor-mean",
}
LOSSES = DistillationLosses(base=4.0, ensemble=2.0, held_out=LossChange(3.0, 2.5))
STEP = DistillationRecord(kept=True, reason="the held-out public loss improved", losses=LOSSES)


@pytest.fixture(scope="module")
def model_folder(make_model_folder: Callable, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a tiny model that can be sure of something: with small embeddings its laws are nearly even."""
    folder = tmp_path_factory.mktemp("sure")
    shutil.copytree(make_model_folder(), folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data *= 12
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_config(make_config: Callable, model_folder: str, private_file: str) -> Callable[..., RunConfig]:
    """Return a function (flat overrides) -> the tiny federation on that model, trained so that it learns."""

    def make(overrides: dict[str, Any] | None = None) -> RunConfig:
        learning = {
            "model.name": model_folder,
            "data.source": private_file,
            "lora.rank": 4,
            "lora.target-modules": "all-linear",
            "train.local-steps": 20,
            "train.learning-rate": 0.02,
        }
        config: RunConfig = make_config({**learning, **(overrides or {})})
        return config

    return make


def write_rows(path: Path, number: int, first: int) -> str:
    """Write rows of four clients who have learnt to answer in four ways."""
    lines = []
    for client, form in FORMS.items():
        for row in range(first, first + number):
            words = WORDS[row % 12], WORDS[(row // 12 + 5 * row + 1) % 12]
            line = {"instruction": f"{words[0]} {words[1]}?", "output": form.format(*words), "client": client}
            lines.append(json.dumps(line) + "\n")
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def private_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("private") / "private.jsonl", 24, 0)


@pytest.fixture(scope="module")
def public_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write public rows of the clients' four kinds, which no client has."""
    return write_rows(tmp_path_factory.mktemp("public") / "public.jsonl", 12, 24)


@pytest.fixture
def run(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[ServerState, list[str]]]:
    """Return a function (name, hook on every record, **flat overrides) that does a run of two rounds."""

    def do(name: str, hook: Callable[[RoundRecord], None] = lambda record: None, **flat: Any) -> Any:
        notices: list[str] = []
        fixed = {"run.output": str(tmp_path), "run.name": name, "federation.num-rounds": 2}
        config = make_config({**fixed, "train.token-budget": 1, **flat})
        watch = Watch(notice=notices.append, record=hook)
        return run_federation(config, local_grid(config, app, num_nodes=2), watch), notices

    return do


@pytest.fixture
def trained(make_config: Callable, open_run: Callable) -> Callable[..., Any]:
    """Return a function (**flat) -> a session, the states around its first round, the clients' adapters."""

    def do(**flat: Any) -> Any:
        opened = open_run(make_config({**CHEAP, **flat, "distill.when": "never"}))
        teachers = Teachers(opened.state.adapter, 1, 8)
        original = opened.session.watch
        session = replace(
            opened.session, watch=replace(original, client=lambda number, update: teachers.add(update))
        )
        after, record = next_round(session, opened.state)
        assert record.accepted == NAMES
        distilling = resolve(session.config.override({"distill.when": CHEAP["distill.when"]}))
        return replace(session, plan=distilling), opened.state, after, teachers.without(())

    return do


def steps_of(state: ServerState) -> list[DistillationRecord]:
    return [record.distillation for record in state.records if record.distillation]


def timeless(record: RoundRecord) -> dict[str, Any]:
    values = asdict(record)
    step, training = values["distillation"], {**values["training"], "seconds": {}}
    return {**values, "seconds": 0, "training": training, "distillation": step and {**step, "seconds": 0}}


@pytest.mark.parametrize(("when", "expected"), [("never", []), ("last", [3]), ("every", [1, 2, 3])])
def test_a_step_is_due_never_in_the_last_round_or_in_every_one(when: str, expected: list[int]) -> None:
    plan = resolve(RunConfig.from_flat({"distill.when": when})).distillation
    assert [number for number in (1, 2, 3) if plan is not None and plan.is_due(number)] == expected


def update(
    client: str, weight: float, delta: torch.Tensor, rank: int = 4, round_num: int = 1
) -> ClientUpdate:
    return ClientUpdate(
        client_id=client,
        round_num=round_num,
        rank=rank,
        delta=delta,
        weight=weight,
        num_tokens=1,
        train_loss=1.0,
    )


def test_the_heaviest_clients_teach_and_of_equal_ones_the_first(trained: Callable) -> None:
    _, before, _, _ = trained()
    start = before.adapter
    delta = torch.ones(start.layout.size)
    teachers = Teachers(start, 1, 2)
    for client, weight in (("a", 1.0), ("b", 3.0), ("c", 1.0), ("d", 3.0), ("e", 2.0), ("f", 3.0)):
        teachers.add(update(client, weight, delta))
        assert len(teachers.kept) <= 2
    assert [kept.client_id for kept in teachers.kept] == ["b", "d"]
    assert [kept.client_id for kept in teachers.without({"b"})] == ["d"]
    assert torch.equal(teachers.kept[0].vector, start.vector + delta)
    assert priors_of(teachers.kept).tolist() == [0.5, 0.5]


def test_a_teacher_of_a_lower_rank_is_what_its_client_has_and_a_late_one_does_not_teach(
    trained: Callable,
) -> None:
    _, before, _, _ = trained()
    layout = before.adapter.layout
    low = at_rank(layout, 1)
    delta = torch.randn(low.size, generator=torch.Generator().manual_seed(1))
    teachers = Teachers(before.adapter, 2, 8)
    teachers.add(update("late", 9.0, torch.ones(layout.size), round_num=1))
    teachers.add(update("low", 1.0, delta, rank=1, round_num=2))
    (kept,) = teachers.kept
    own = with_rank(before.adapter.vector, layout, 1) + delta
    for (a, b), (own_a, own_b) in zip(layout.factors(kept.vector), low.factors(own), strict=True):
        torch.testing.assert_close(layout.scale * b @ a, low.scale * own_b @ own_a)


def test_a_step_that_is_kept_changes_the_adapter_and_says_what_it_did(run: Callable, tmp_path: Path) -> None:
    plain, _ = run("plain", **{"federation.num-rounds": 1})
    many = {**CHEAP, "distill.num-texts": 48, "distill.when": "last", "federation.num-rounds": 1}
    state, notices = run("distilled", **many)
    (step,) = steps_of(state)
    assert step.kept, step
    losses, texts = step.losses, step.texts
    assert losses.held_out.after < losses.held_out.before
    assert state.records[-1].adapter == state.adapter.digest != plain.adapter.digest
    assert (step.teachers.kind, texts.kind, texts.held_out_kind) == ("posterior", "synthetic", "synthetic")
    assert (step.teachers.number, texts.num_held_out) == (4, 12)
    assert 0 < texts.number <= 48
    assert losses.control is None
    assert step.num_tokens > 0
    assert step.target_bytes > 0
    for weights in step.teachers.weights.values():
        assert set(weights) == set(NAMES)
        assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
    (line,) = [line for line in notices if "distilled" in line]
    assert line == f"round 1: {describe_step(step)}"
    assert "held-out texts synthetic too" in line
    written = json.loads((tmp_path / "distilled" / "rounds.jsonl").read_text().splitlines()[-1])
    assert written["distillation"]["losses"]["held_out"]["after"] == losses.held_out.after
    card = (tmp_path / "distilled" / "adapter" / "README.md").read_text()
    assert f"{losses.held_out.before:.4f} before, {losses.held_out.after:.4f} after" in card
    assert not any(name in card for name in NAMES), "a card names no data holder"


@pytest.mark.parametrize("rate", [1.0, 1e30])
def test_a_harmful_step_is_refused_and_the_aggregate_stays(
    rate: float, run: Callable, public_file: str
) -> None:
    plain, _ = run("plain", **{"federation.num-rounds": 1})
    absurd = {**CHEAP, "distill.text": public_file, "distill.learning-rate": rate, "federation.num-rounds": 1}
    state, notices = run("absurd", **absurd)
    (step,) = steps_of(state)
    assert not step.kept
    assert "did not improve" in step.reason or "diverged" in step.reason
    assert state.adapter.digest == plain.adapter.digest == state.records[-1].adapter
    assert state.records[-1].held_out == plain.records[-1].held_out
    assert any("not distilled" in line for line in notices)


def test_public_text_is_held_out_by_document_and_the_control_has_equal_tokens(
    run: Callable, public_file: str
) -> None:
    for text, kind in ((public_file, "public"), (f"synthetic+{public_file}", "both")):
        flat = {**CHEAP, "distill.text": text, "distill.control": True, "federation.num-rounds": 1}
        state, notices = run(kind, **flat)
        (step,) = steps_of(state)
        assert (step.texts.kind, step.texts.held_out_kind) == (kind, "public")
        assert step.texts.num_held_out == (6 if kind == "public" else 3)
        assert set(step.losses.domains) <= set(NAMES)
        assert step.losses.control is not None
        assert any("fine-tuning on the same texts" in line for line in notices)


@pytest.mark.parametrize("read_out", ["residual", "stack"])
def test_the_student_learns_on_the_base_the_round_leaves(
    read_out: str, run: Callable, public_file: str
) -> None:
    """It is another than the teachers'; were it not, the loss before would not be the aggregate's."""
    flat = {**CHEAP, "aggregation.read-out": read_out, "distill.text": public_file}
    state, _ = run(read_out, **flat)
    first, second = steps_of(state)
    assert first.losses.base == second.losses.base, "the base model is the same in every round"
    assert first.kept
    assert first.losses.held_out.after < first.losses.held_out.before < first.losses.base


@pytest.mark.parametrize("stopped_in", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    stopped_in: int, run: Callable, public_file: str
) -> None:
    def stop(record: RoundRecord) -> None:
        if record.round_num == stopped_in:
            raise KeyboardInterrupt

    flat = {**CHEAP, **FEW, "distill.text": f"synthetic+{public_file}"}
    whole, _ = run("whole", **flat)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop, **flat)
    resumed, _ = run("stopped", **flat, **({"run.resume": True} if stopped_in > 1 else {}))
    assert len(steps_of(whole)) == 2
    assert resumed.adapter.digest == whole.adapter.digest
    assert [timeless(record) for record in resumed.records] == [timeless(record) for record in whole.records]


def test_a_run_with_more_rounds_goes_on_from_what_was_aggregated(run: Callable) -> None:
    flat = {**CHEAP, **FEW, "distill.when": "last", "distill.learning-rate": 1e-3}
    whole, _ = run("whole", **flat, **{"federation.num-rounds": 3})
    short, _ = run("longer", **flat)
    assert short.records[-1].distillation.kept
    assert short.undistilled.digest != short.adapter.digest
    longer, _ = run("longer", **flat, **{"run.resume": True, "federation.num-rounds": 3})
    assert longer.adapter.digest == whole.adapter.digest
    assert [timeless(record)["distillation"] for record in longer.records] == [
        timeless(record)["distillation"] for record in whole.records
    ]
    assert [record.adapter for record in longer.records] == [record.adapter for record in whole.records]


@pytest.fixture
def two_rounds(run: Callable) -> dict[str, Any]:
    """Return the keys of a private run that distils last and whose budget is spent after two rounds."""
    flat = {**CHEAP, **FEW, **PRIVATE, "distill.when": "last", "privacy.noise-multiplier": 2.0}
    state, _ = run("probe", **{**flat, "distill.when": "never", "privacy.epsilon": 1e5})
    return {**flat, "privacy.epsilon": 1.01 * state.ledger.epsilon(RunConfig().privacy.delta)}


def test_a_run_whose_budget_is_spent_keeps_what_it_has_distilled(
    run: Callable, two_rounds: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under so much noise a student need not be better.
    monkeypatch.setattr("strategies.distillation.step.judged", lambda *losses, **more: (True, "it is kept"))
    done, notices = run("spent", **two_rounds)
    assert not any("is not done" in line for line in notices)
    again, notices = run("spent", **two_rounds, **{"run.resume": True, "federation.num-rounds": 3})
    assert any("budget is spent" in line for line in notices)
    assert again.round_num == 2
    assert again.adapter.digest == done.adapter.digest != done.undistilled.digest
    assert again.records[-1].distillation == done.records[-1].distillation is not None
    assert again.records[-1].held_out == done.records[-1].held_out


def test_a_run_that_ends_before_its_step_says_that_it_is_not_done(
    run: Callable, two_rounds: dict[str, Any], tmp_path: Path
) -> None:
    state, notices = run("short", **two_rounds, **{"federation.num-rounds": 3})
    assert steps_of(state) == []
    (line,) = [line for line in notices if "budget is spent" in line]
    assert line.endswith("; the distillation step planned after round 3 is not done")
    assert json.loads((tmp_path / "short" / "result.json").read_text())["stopped"] == line


def test_a_finished_run_that_is_resumed_keeps_its_distilled_adapter(run: Callable) -> None:
    flat = {**CHEAP, **FEW, "distill.when": "last"}
    done, _ = run("done", **flat)
    again, _ = run("done", **flat, **{"run.resume": True})
    assert again.adapter.digest == done.adapter.digest
    assert again.records[-1].distillation == done.records[-1].distillation


def test_in_a_local_run_the_server_has_the_engine_of_its_clients(
    make_config: Callable, open_run: Callable
) -> None:
    opened = open_run(make_config(CHEAP))
    next_round(opened.session, opened.state)
    assert server_engine(opened.session) is opened.holder(2).engine


def test_a_step_that_cannot_open_the_base_model_costs_no_round(trained: Callable) -> None:
    session, before, after, adapters = trained()
    elsewhere = replace(session, plan=resolve(session.config.override({"model.name": "/nowhere"})))
    adapter, step = distilled(elsewhere, before, after, adapters)
    assert adapter is after.adapter
    assert not step.kept
    assert step.losses is None
    assert "\n" not in describe_step(step)
    assert describe_step(step).startswith("not distilled: ")
    assert describe_step(step).endswith("the aggregate stays")
    assert table_cell(step) == "refused"


def test_without_a_teacher_the_aggregate_stays(trained: Callable) -> None:
    session, before, after, _ = trained()
    adapter, step = distilled(session, before, after, ())
    assert adapter is after.adapter
    assert "no client of the round is left to teach" in step.reason


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), "out of memory"),
        (RuntimeError("first line\nsecond"), "it failed: first line"),
    ],
)
def test_whatever_fails_in_a_step_is_one_line(
    error: Exception, words: str, trained: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*unused: Any, **also_unused: Any) -> None:
        raise error

    monkeypatch.setattr("strategies.distillation.step.distil", fail)
    session, before, after, adapters = trained()
    adapter, step = distilled(session, before, after, adapters)
    assert adapter is after.adapter
    assert words in step.reason
    assert "\n" not in describe_step(step)


def with_public(session: Any, source: str, **flat: Any) -> Any:
    from strategies.distillation.step import open_public_text

    config = session.config.override({**CHEAP, "distill.text": source, **flat})
    return replace(session, plan=resolve(config), public_text=open_public_text(resolve(config)))


def test_every_client_is_heard_where_its_own_text_is(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    adapter, step = distilled(with_public(session, public_file), before, after, adapters)
    assert set(step.teachers.weights) == set(NAMES)
    for domain, weights in step.teachers.weights.items():
        assert weights[domain] > 0.7
    assert step.kept
    losses = step.losses
    assert losses.ensemble < losses.held_out.after < losses.held_out.before < losses.base
    assert 0 < losses.gap_closed < 1
    assert adapter.digest != after.adapter.digest


def test_a_garbage_client_loses_its_weight(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    noise = torch.randn(after.adapter.layout.size, generator=torch.Generator().manual_seed(0))
    garbage = ClientAdapter("mallory", sum(adapter.weight for adapter in adapters), 2.0 * noise)
    _, step = distilled(with_public(session, public_file), before, after, (*adapters, garbage))
    assert step.teachers.kind == "posterior"
    for weights in step.teachers.weights.values():
        assert weights["mallory"] < 0.2, "before the first token it has half of all weight"
    assert step.kept


def unlearnt(adapter: AdapterState) -> torch.Tensor:
    """Return an adapter [P] that expects what was learnt less than the base model does: B turned round."""
    turned = adapter.vector.clone()
    for _, b in adapter.layout.factors(turned):
        b *= -0.2
    return turned


def test_public_text_in_no_clients_support_weighs_all_clients_alike_and_says_so(
    trained: Callable, make_model_folder: Callable, public_file: str
) -> None:
    session, before, after, adapters = trained(**{"model.name": str(make_model_folder())})
    layout = after.adapter.layout
    lost = [
        replace(adapter, vector=unlearnt(AdapterState(layout, adapter.vector)), weight=1.0 + number)
        for number, adapter in enumerate(adapters)
    ]
    _, step = distilled(with_public(session, public_file), before, after, lost)
    assert step.teachers.kind == "uniform"
    assert "in no client's support" in step.reason
    for weights in step.teachers.weights.values():
        assert list(weights.values()) == pytest.approx([0.25] * 4)


@pytest.mark.parametrize(
    "flat",
    [{}, {"evaluation.prompts": "sum of? || list it?"}, {"data.text-column": "text"}],
    ids=["questions first", "public prompts", "plain text"],
)
def test_synthetic_text_begins_with_what_there_is(flat: dict[str, str], trained: Callable) -> None:
    session, _, _, adapters = trained()
    config = session.config.override({**CHEAP, **FEW, **flat})
    material = make_material(resolve(config), (), server_engine(session), adapters, 1)
    again = make_material(resolve(config), (), server_engine(session), adapters, 1)
    assert material == again != make_material(resolve(config), (), server_engine(session), adapters, 2)
    tokenizer = server_engine(session).base.tokenizer
    begins = {tokenizer.decode(row.tokens)[:8] for row in material.rows}
    if "data.text-column" in flat:
        assert all(row.labels[0] == -100 for row in material.rows)
        assert begins != {"<|user|>"}
    else:
        assert begins == {"<|user|>"}
        assert all("<|assistant|>" in tokenizer.decode(row.tokens) for row in material.rows)
    assert not {row.tokens for row in material.rows} & {row.tokens for row in material.held_out}
    assert set(material.domains) <= set(NAMES)
    assert all(len(row.tokens) <= 48 for row in (*material.rows, *material.held_out))


def test_no_row_distilled_on_is_the_head_that_a_held_out_text_is_read_to(
    trained: Callable, tmp_path: Path
) -> None:
    """Texts that differ beyond `distill.max-tokens` alone are one row, so copies."""
    head = " ".join(WORDS * 4)
    own = [{"text": f"{word} {other} " * 8} for word in WORDS for other in WORDS if word < other]
    draw = random.Random(0)
    tails = (" ".join(str(draw.getrandbits(40)) for _ in range(40)) for _ in range(60))
    same = [{"text": f"{head} {tail}"} for tail in tails]
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*own, *same)))
    session, _, _, adapters = trained()
    public = with_public(session, str(path), **{"distill.num-texts": 200})
    material = make_material(public.plan, public.public_text, server_engine(session), adapters, 1)
    heads = [row.tokens for row in material.held_out if row.num_cut]
    assert heads, "a held-out text has the head"
    assert not {row.tokens for row in material.rows} & {row.tokens for row in material.held_out}
    assert material.texts.num_removed >= 40


def test_where_few_synthetic_texts_pass_most_of_them_are_learnt_from(trained: Callable) -> None:
    session, _, _, adapters = trained()
    config = session.config.override({**CHEAP, "distill.num-texts": 40})

    def strict(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
        return [number % 5 == 0 for number in range(len(texts))]

    material = make_material(resolve(config), (), server_engine(session), adapters, 1, strict)
    assert material.texts.num_written - material.texts.num_refused == 10
    assert (len(material.rows) + material.texts.num_removed, len(material.held_out)) == (8, 2)
    assert material.rows
    with pytest.raises(NoDataError, match="none of 50 synthetic texts is original"):
        make_material(resolve(config), (), server_engine(session), adapters, 1, refuse_all)


def refuse_all(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
    return [False] * len(texts)


def test_where_no_synthetic_text_passes_the_public_ones_are_left(trained: Callable, public_file: str) -> None:
    session, _, _, adapters = trained()
    mixed = with_public(session, f"synthetic+{public_file}")
    material = make_material(mixed.plan, mixed.public_text, server_engine(session), adapters, 1, refuse_all)
    assert (material.texts.kind, material.texts.held_out_kind, len(material.rows)) == ("public", "public", 12)
    assert material.texts.num_refused == material.texts.num_written == 12


def test_beside_plain_public_text_synthetic_text_begins_with_the_runs_prompts(
    trained: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": f"{one} of {one}"}) + "\n" for one in WORDS))
    session, _, _, adapters = trained()
    prompts = {"evaluation.prompts": "sum of? || list it?"}
    mixed = with_public(session, f"synthetic+{path}", **prompts)
    written: list[Encoded] = []

    def listen(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
        written.extend(texts)
        return [True] * len(texts)

    engine = server_engine(session)
    make_material(mixed.plan, mixed.public_text, engine, adapters, 1, listen)
    assert written
    begins = tuple(f"<|user|>{prompt}<|end|><|assistant|>" for prompt in ("sum of?", "list it?"))
    assert all(engine.base.tokenizer.decode(row.tokens).startswith(begins) for row in written)


def test_prompts_that_leave_no_room_for_an_answer_are_refused(trained: Callable) -> None:
    session, before, after, adapters = trained()
    flat = {**CHEAP, "distill.max-tokens": 8, "evaluation.prompts": "a prompt longer than the whole text is"}
    adapter, step = distilled(
        replace(session, plan=resolve(session.config.override(flat))), before, after, adapters
    )
    assert adapter is after.adapter
    assert "distill.max-tokens: the shortest prompt" in step.reason


def test_flowers_own_loop_has_the_step_too(make_config: Callable) -> None:
    """`configure_train` and `aggregate_train` end a round as our own loop does."""
    flat = {**CHEAP, **FEW, "wire.codec": "fp32", "train.token-budget": 1}
    config = make_config({**flat, "federation.num-rounds": 1})
    heard: list[str] = []
    strategy = FederatedLora(config, Watch(notice=heard.append))
    grid = local_grid(config, app, num_nodes=2)
    session = open_session(resolve(config), grid)
    arrays = write_plain(session.initial)
    messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
    answer, _ = strategy.aggregate_train(1, grid.send_and_receive(messages))
    state, record = next_round(session, ServerState(0, session.initial))
    assert read_plain(answer, session.layout).digest == state.adapter.digest
    assert record.distillation is not None
    assert [line for line in heard if line.startswith("round 1: ")]


def test_a_stock_strategy_and_a_step_are_refused_together(make_config: Callable) -> None:
    config = make_config({**CHEAP, "aggregation.read-out": "factor-mean"})
    with pytest.raises(ConfigError, match=r"a stock Flower strategy.*distill\.when = 'never'"):
        open_session(resolve(config), local_grid(config, app), stock=FedAvg())


@pytest.mark.parametrize("teacher", ["uniform", "logit-mean"])
def test_other_teachers_teach_as_they_are_named(teacher: str, trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    changed = with_public(session, public_file, **{"distill.teacher": teacher})
    _, step = distilled(changed, before, after, adapters)
    assert step.teachers.kind == teacher
    assert step.losses.ensemble > 0


def test_one_teacher_that_is_the_aggregate_closes_no_gap(trained: Callable, public_file: str) -> None:
    """The student starts where its only teacher stands: there is nothing to learn."""
    session, before, after, _ = trained()
    alone = (ClientAdapter("anna", 1.0, after.adapter.vector),)
    _, step = distilled(with_public(session, public_file), before, after, alone)
    assert step.losses.ensemble == pytest.approx(step.losses.held_out.before, abs=1e-4)
    assert step.losses.held_out.after == pytest.approx(step.losses.held_out.before, abs=0.05)


@pytest.mark.parametrize(
    ("after", "kept"), [(2.0, True), (3.0, False), (3.1, False), (float("nan"), False), (float("inf"), False)]
)
def test_the_gate_wants_a_lower_loss(after: float, kept: bool) -> None:
    assert judged(3.0, after, "public")[0] is kept


def test_a_gain_within_its_standard_error_is_not_followed() -> None:
    assert judged(3.0, 2.9, "public", error=0.09)[0]
    kept, reason = judged(3.0, 2.9, "public", error=0.11)
    assert not kept
    assert reason == "the held-out public loss improved by no more than its standard error, 0.1100"


def test_the_standard_error_of_a_gain_is_that_of_a_ratio_over_texts() -> None:
    """Equal lengths: the textbook standard error of a mean. Unequal ones: what many samples vary by."""
    old, new = Loss(2.0, {}, ((20.0, 10), (22.0, 10), (18.0, 10))), Loss(1.9, {}, ((19.0, 10),) * 3)
    changes = torch.tensor([-0.1, -0.3, 0.1])
    assert error_of_gain(old, new) == pytest.approx(float(changes.std() / 3**0.5))
    assert error_of_gain(Loss(2.0, {}, ((20.0, 10),)), Loss(1.9, {}, ((19.0, 10),))) == 0.0

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 40, (2000, 60), generator=generator)
    gains = tokens * (0.05 + 0.2 * torch.randn(2000, 60, generator=generator))
    errors = []
    for sums, sizes in zip(gains[:200].tolist(), tokens[:200].tolist(), strict=True):
        after, before = tuple(zip(sums, sizes, strict=True)), tuple((0.0, size) for size in sizes)
        errors.append(error_of_gain(Loss(0.0, {}, before), Loss(0.0, {}, after)))
    true = float((gains.sum(dim=1) / tokens.sum(dim=1)).std())
    assert sum(errors) / len(errors) == pytest.approx(true, rel=0.06)


def test_a_teacher_that_knows_no_more_than_its_student_is_not_followed() -> None:
    assert judged(3.0, 2.0, "public", teacher=2.9)[0]
    for teacher in (3.0, 3.5, float("nan")):
        kept, reason = judged(3.0, 2.0, "public", teacher=teacher)
        assert not kept
        assert "no better than the aggregate" in reason


def test_the_gate_refuses_what_forgets_the_clients_own_texts() -> None:
    assert judged(3.0, 2.0, "public", own=LossChange(2.5, 2.5))[0]
    kept, reason = judged(3.0, 2.0, "public", own=LossChange(2.5, 2.6))
    assert not kept
    assert reason == "the loss on texts that the clients' adapters write would rise from 2.5000 to 2.6000"


def test_beside_public_text_the_clients_own_texts_are_measured(trained: Callable, public_file: str) -> None:
    session, before, after, adapters = trained()
    _, step = distilled(with_public(session, public_file), before, after, adapters)
    held_out, own = step.losses.held_out, step.losses.own
    assert step.kept is (held_out.after < held_out.before and own.after <= own.before)


def test_texts_that_data_holders_have_do_not_pass_and_the_verdicts_are_kept(
    trained: Callable, private_file: str, tmp_path: Path
) -> None:
    session, _, _, adapters = trained()
    engine = server_engine(session)
    lines = [json.loads(line) for line in Path(private_file).read_text().splitlines()[::24]]
    theirs = [
        encode(
            Example((Turn("user", line["instruction"]), Turn("assistant", line["output"]))),
            engine.base.tokenizer,
            256,
        )
        for line in lines
    ]
    written = make_material(session.plan, (), engine, adapters, 1).rows
    passed = Gates(session, engine, adapters, 1, tmp_path)([*theirs, *written], [])
    assert not any(passed[: len(theirs)])
    assert any(passed[len(theirs) :])
    screening = json.loads((tmp_path / "synthetic.json").read_text())
    assert [Verdict(**verdict).passed for verdict in screening["verdicts"]] == list(passed)
    assert len(screening["provenance"]["adapters"]) == len(NAMES)
    assert screening["provenance"]["licence"].startswith("not stated")


def test_a_step_learns_from_screened_texts_alone(trained: Callable) -> None:
    session, before, after, adapters = trained()
    screened = replace(session, plan=resolve(session.config.override({**CHEAP, "distill.originality": "on"})))
    _, step = distilled(screened, before, after, adapters)
    texts = step.texts
    assert texts.num_written == 24 + 6
    assert texts.number + texts.num_held_out + texts.num_removed + texts.num_refused == texts.num_written


def test_clients_roll_back_what_would_worsen_their_own_loss(trained: Callable) -> None:
    session, _, after, _ = trained()
    noise = torch.randn(after.adapter.layout.size, generator=torch.Generator().manual_seed(0))
    worse = replace(after, adapter=AdapterState(after.adapter.layout, 2.0 * noise))
    asked = ask_clients(session, after, worse, STEP)
    assert asked.state is after
    assert not asked.record.kept
    assert asked.record.losses.clients.after > asked.record.losses.clients.before
    assert "would rise" in asked.record.reason
    turned = ask_clients(session, worse, after, STEP)
    assert turned.state is after
    assert turned.record.kept
    assert turned.held_out == asked.held_out, "the losses are those of the adapter that is kept"


def test_clients_who_measure_nothing_accept_nothing(make_config: Callable, open_run: Callable) -> None:
    opened = open_run(make_config({"data.held-out-fraction": 0.0}))
    asked = ask_clients(opened.session, opened.state, replace(opened.state), STEP)
    assert asked.state is opened.state
    assert not asked.record.kept


def test_the_gate_of_clients_measures_in_the_round_itself(run: Callable, public_file: str) -> None:
    plain, _ = run("plain", **{"evaluation.every": 1, "federation.num-rounds": 1})
    flat = {**CHEAP, "distill.text": public_file, "distill.gate": "clients", "evaluation.every": 1}
    state, _ = run("gated", **flat)
    for record in state.records[1:]:
        step = record.distillation
        assert step is not None
        clients = step.losses.clients
        if clients is not None:
            kept = clients.after if step.kept else clients.before
            assert record.mean_held_out == pytest.approx(kept)
            assert step.kept is (clients.after <= clients.before)
    first = state.records[1].distillation
    assert first is not None
    assert first.losses.clients.before == pytest.approx(plain.records[1].mean_held_out)


@pytest.mark.parametrize(
    ("flat", "asked"),
    [
        ({}, True),
        ({"distill.gate": "public"}, False),
        ({"distill.text": "rows.jsonl"}, False),
        ({"distill.text": "synthetic+rows.jsonl"}, False),
        ({"distill.text": "rows.jsonl", "distill.gate": "clients"}, True),
        ({"data.held-out-fraction": 0.0}, False),
        ({"privacy.epsilon": 8.0}, True),  # of rows; those held out are nobody's training
        (PRIVATE, False),
    ],
)
def test_clients_judge_where_no_other_text_does_and_their_losses_may_leave(
    flat: dict[str, Any], asked: bool
) -> None:
    plan = resolve(RunConfig.from_flat({"distill.when": "last", **flat}))
    assert distillation_of(plan).asks_clients is asked


def test_synthetic_text_alone_is_judged_by_the_clients_too(run: Callable) -> None:
    state, _ = run("asked", **{**CHEAP, "distill.gate": "auto", "distill.when": "last"})
    (step,) = steps_of(state)
    clients = step.losses.clients
    assert clients is not None
    assert step.kept is (clients.after <= clients.before)


def test_public_text_that_cannot_be_read_ends_a_run_before_its_first_round(run: Callable) -> None:
    heard: list[RoundRecord] = []
    with pytest.raises(DataError, match=r"^distill\.text: /no/such/file\.jsonl: no such file"):
        run("unread", heard.append, **{**CHEAP, "distill.text": "/no/such/file.jsonl"})
    assert heard == []


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"distill.text": " "}, ["distill.text"]),
        ({"wire.node-sum": True, "aggregation.read-out": "factor-mean"}, ["distill.when", "wire.node-sum"]),
        ({"aggregation.preset": "fedsa"}, ["distill.when", "aggregation.read-out"]),
        ({"distill.gate": "clients", "data.held-out-fraction": 0.0}, ["distill.gate", "data.held-out-frac"]),
        ({"distill.gate": "clients", "data.max-held-out": 0}, ["distill.gate", "data.max-held-out"]),
        ({"distill.num-texts": 3278}, ["distill.num-texts = 3278", "4098", "4096"]),
        ({"distill.num-texts": 8194, "distill.text": "synthetic+a.jsonl"}, ["distill.num-texts", "4096"]),
        ({"distill.max-tokens": 4097, "distill.text": "synthetic+a.jsonl"}, ["distill.max-tokens = 4097"]),
        ({"distill.max-tokens": 4097, "distill.originality": "on"}, ["distill.originality = 'off'"]),
    ],
)
def test_what_a_step_cannot_go_with_is_refused(flat: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RunConfig.from_flat({"distill.when": "last", **flat}))
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    resolve(RunConfig.from_flat(flat))  # where nothing is distilled it may stand


@pytest.mark.parametrize(
    "flat",
    [
        {"distill.num-texts": 3276, "distill.max-tokens": 4096},  # 4,095 with those held out
        {"distill.num-texts": 8192, "distill.text": "synthetic+a.jsonl"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, "distill.text": "a.jsonl"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, "distill.originality": "off"},
        {"distill.num-texts": 9999, "distill.max-tokens": 9999, **PRIVATE},
    ],
    ids=["as many as fit", "half public", "public alone", "not screened", "private"],
)
def test_texts_of_which_data_holders_need_not_be_asked_more_than_they_answer_may_stand(
    flat: dict[str, Any],
) -> None:
    RunConfig.from_flat({"distill.when": "last", **flat})


def test_the_table_says_how_the_loss_changed_or_that_a_step_was_refused() -> None:
    assert table_cell(None) == ""
    assert table_cell(STEP) == "-0.500"
    assert table_cell(replace(STEP, kept=False)) == "refused"
