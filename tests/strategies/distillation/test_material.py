"""The rows of a distillation step: how synthetic text begins, what is held out, what is left out."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fedllm.data.fields import Example, Turn
from fedllm.errors import NoDataError
from fedllm.models.chat import Encoded, encode
from fedllm.originality.verdict import Verdict
from strategies.distillation.originality import text_screen
from strategies.distillation.step import open_engine
from tests.strategies.distillation.builders import FEW, NAMES, WORDS, material_of, with_keys, with_public


@pytest.mark.parametrize(
    "flat",
    [
        {},
        pytest.param({"evaluation.prompts": "sum of? || list it?"}, marks=pytest.mark.soak),
        {"data.columns": "text=text"},
    ],
    ids=["questions first", "public prompts", "plain text"],
)
def test_synthetic_text_begins_with_what_there_is(flat: dict[str, str], trained: Callable) -> None:
    session, _, _, adapters = trained()
    session = with_keys(session, **{**FEW, **flat})
    material = material_of(session, adapters)
    assert material == material_of(session, adapters) != material_of(session, adapters, round_num=2)
    tokenizer = open_engine(session).base.tokenizer
    begins = {tokenizer.decode(row.tokens)[:8] for row in material.rows}
    if "data.columns" in flat:
        assert all(row.labels[0] == -100 for row in material.rows)
        assert begins != {"<|user|>"}
    else:
        assert begins == {"<|user|>"}
        assert all("<|assistant|>" in tokenizer.decode(row.tokens) for row in material.rows)
    assert not {row.tokens for row in material.rows} & {row.tokens for row in material.held_out}
    assert set(material.domains) <= set(NAMES)
    assert all(len(row.tokens) <= 48 for row in (*material.rows, *material.held_out))


def test_no_row_to_distil_on_is_the_head_of_a_held_out_text(trained: Callable, tmp_path: Path) -> None:
    """Texts that differ beyond `distill.max-tokens` alone are one row, so copies."""
    head = " ".join(WORDS * 4)
    own = [{"text": f"{word} {other} " * 8} for word in WORDS for other in WORDS if word < other]
    draw = random.Random(0)
    tails = (" ".join(str(draw.getrandbits(40)) for _ in range(40)) for _ in range(60))
    same = [{"text": f"{head} {tail}"} for tail in tails]
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*own, *same)))
    session, _, _, adapters = trained()
    material = material_of(with_public(session, str(path), **{"distill.num-texts": 200}), adapters)
    heads = [row.tokens for row in material.held_out if row.num_cut]
    assert heads, "a held-out text has the head"
    assert not {row.tokens for row in material.rows} & {row.tokens for row in material.held_out}
    assert material.texts.num_removed >= 40


@pytest.mark.soak
def test_of_few_texts_that_pass_most_are_learnt_from(trained: Callable) -> None:
    session, _, _, adapters = trained()
    session = with_keys(session, **{"distill.num-texts": 40})

    def strict(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
        return [number % 5 == 0 for number in range(len(texts))]

    material = material_of(session, adapters, strict)
    assert material.texts.num_written - material.texts.num_refused == 10
    assert (len(material.rows) + material.texts.num_removed, len(material.held_out)) == (8, 2)
    assert material.rows
    with pytest.raises(NoDataError, match="none of 50 synthetic texts is original"):
        material_of(session, adapters, refuse_all)


def refuse_all(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
    return [False] * len(texts)


def test_where_no_synthetic_text_passes_public_ones_are_left(trained: Callable, public_file: str) -> None:
    session, _, _, adapters = trained()
    mixed = with_public(session, f"synthetic+{public_file}")
    material = material_of(mixed, adapters, refuse_all)
    assert (material.texts.kind, material.texts.held_out_kind, len(material.rows)) == ("public", "public", 12)
    assert material.texts.num_refused == material.texts.num_written == 12


@pytest.mark.soak
def test_next_to_plain_public_text_the_runs_prompts_begin(trained: Callable, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": f"{one} of {one}"}) + "\n" for one in WORDS))
    session, _, _, adapters = trained()
    prompts = {"evaluation.prompts": "sum of? || list it?"}
    mixed = with_public(session, f"synthetic+{path}", **prompts)
    written: list[Encoded] = []

    def listen(texts: Sequence[Encoded], public: Sequence[Encoded]) -> list[bool]:
        written.extend(texts)
        return [True] * len(texts)

    engine = open_engine(session)
    material_of(mixed, adapters, listen)
    assert written
    begins = tuple(f"<|user|>{prompt}<|end|><|assistant|>" for prompt in ("sum of?", "list it?"))
    assert all(engine.base.tokenizer.decode(row.tokens).startswith(begins) for row in written)


def test_private_texts_do_not_pass_and_verdicts_are_kept(
    trained: Callable, private_file: str, tmp_path: Path
) -> None:
    session, _, _, adapters = trained()
    engine = open_engine(session)
    lines = [json.loads(line) for line in Path(private_file).read_text().splitlines()[::24]]
    theirs = [
        encode(
            Example((Turn("user", line["instruction"]), Turn("assistant", line["output"]))),
            engine.base.tokenizer,
            256,
        )
        for line in lines
    ]
    written = material_of(session, adapters).rows
    screen = text_screen(replace(session, folder=tmp_path), engine, adapters, 1)
    passed = screen([*theirs, *written], [])
    assert not any(passed[: len(theirs)])
    assert any(passed[len(theirs) :])
    screening = json.loads((tmp_path / "synthetic.json").read_text())
    assert [Verdict(**verdict).passed for verdict in screening["verdicts"]] == list(passed)
    assert len(screening["provenance"]["adapters"]) == len(NAMES)
    assert screening["provenance"]["licence"].startswith("not stated")
