"""Public text of a distillation step: what a document is, how it is parted, which copies are left out."""

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from fedllm.config.keys import DataConfig
from fedllm.config.run_config import RunConfig
from fedllm.data.fields import Example
from fedllm.data.public_text import PublicText
from fedllm.errors import DataError, NoDataError
from fedllm.originality.duplicates import jaccard, shingles
from fedllm.plan.run_plan import distillation_of, resolve
from strategies.distillation.public_text import plain_words, read_public, split_texts

WORDS = tuple(f"word{number}" for number in range(15))


def tokens_of(text: str) -> list[int]:
    """Return a number for every word: the same for the same word."""
    return [zlib.crc32(word.encode()) for word in text.split()]


def texts_of(domain: str, number: int) -> list[PublicText]:
    return [
        PublicText(Example(text=" ".join(f"{domain}{row}{word}" for word in WORDS)), f"{domain}{row}", domain)
        for row in range(number)
    ]


@pytest.mark.parametrize(
    ("text", "synthetic", "source"),
    [
        ("synthetic", True, ""),
        (" synthetic ", True, ""),
        ("docstrings", False, "docstrings"),
        ("synthetic+a/b.jsonl", True, "a/b.jsonl"),
        ("synthetic + a+b.txt", False, "synthetic + a+b.txt"),
        ("a+b.txt", False, "a+b.txt"),
        ("./synthetic", False, "./synthetic"),
    ],
)
def test_the_key_names_synthetic_text_a_source_or_both(text: str, synthetic: bool, source: str) -> None:
    plan = distillation_of(resolve(RunConfig.from_flat({"distill.when": "last", "distill.text": text})))
    assert (plan.has_synthetic, plan.public_source) == (synthetic, source)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_domain_is_the_clients_label_or_else_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "office": "north" if row % 2 else None} for row in range(4)]
    source = write_rows(tmp_path / "letters.jsonl", rows)
    read = read_public(source, DataConfig(partition="column:office"))
    assert [text.domain for text in read] == ["letters", "north", "letters", "north"]
    assert len({text.document for text in read}) == 4
    assert {text.domain for text in read_public(source, DataConfig(partition="iid"))} == {"letters"}


def test_a_document_is_a_file_where_there_are_several(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("first paragraph\n\nsecond paragraph\n")
    several = read_public(str(tmp_path), DataConfig())
    assert len(several) == 4
    assert len({text.document for text in several}) == 2
    assert len({text.document for text in read_public(str(tmp_path / "a.txt"), DataConfig())}) == 2


def test_public_text_need_not_have_the_columns_of_private_text(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [{"text": "first"}, {"text": "second"}])
    read = read_public(source, DataConfig(columns="prompt=asked,response=said"))
    assert [plain_words(text) for text in read] == ["first", "second"]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, DataError, "no such file"),
        ("", NoDataError, "no row can be used"),
        ('{"text": "alone"}\n', DataError, "holds one document"),
        ('{"text": [3]}\n{"text": null}\n', NoDataError, "no row can be used"),
        ('{"other": "x"}\n{"other": "y"}\n', DataError, "no known text columns"),
    ],
)
def test_text_that_cannot_be_used_is_one_line_that_names_the_key(
    content: str | None, error: type[Exception], words: str, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error) as caught:
        read_public(str(path), DataConfig())
    assert str(caught.value).startswith("distill.text")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "alone" not in str(caught.value)


def test_no_document_is_in_both_parts_of_the_asked_sizes() -> None:
    split = split_texts([*texts_of("a", 40), *texts_of("b", 40)], 16, seed=3, tokens_of=tokens_of)
    assert (len(split.train), len(split.held_out), split.num_removed) == (16, 4, 0)
    assert not {text.document for text in split.train} & {text.document for text in split.held_out}
    for part in (split.train, split.held_out):
        counts = [sum(text.domain == domain for text in part) for domain in "ab"]
        assert counts[0] == counts[1], "domains count alike"


def test_a_split_is_a_function_of_the_seed() -> None:
    texts = texts_of("a", 30)
    assert split_texts(texts, 8, seed=1, tokens_of=tokens_of) == split_texts(
        texts, 8, seed=1, tokens_of=tokens_of
    )
    assert split_texts(texts, 8, seed=1, tokens_of=tokens_of) != split_texts(
        texts, 8, seed=2, tokens_of=tokens_of
    )


def test_few_texts_are_parted_four_to_one_and_two_one_to_one() -> None:
    for number, expected in ((10, (8, 2)), (5, (4, 1)), (2, (1, 1))):
        split = split_texts(texts_of("a", number), 1000, seed=0, tokens_of=tokens_of)
        assert (len(split.train), len(split.held_out)) == expected


def test_paragraphs_of_one_document_stay_together() -> None:
    texts = [
        PublicText(
            Example(text=f"{document} {row} " + " ".join(WORDS[: row + 3])), f"{document}.txt", document
        )
        for document in "abcdef"
        for row in range(3)
    ]
    split = split_texts(texts, 100, seed=0, tokens_of=tokens_of)
    assert split.held_out
    assert not {text.document for text in split.train} & {text.document for text in split.held_out}


def test_near_copies_of_held_out_text_are_not_distilled_on() -> None:
    texts = texts_of("a", 20)
    first = split_texts(texts, 100, seed=0, tokens_of=tokens_of)
    leaked = plain_words(first.held_out[0])
    copy = PublicText(Example(text=leaked + " sixteen"), "copy", "a")
    copies = [PublicText(Example(text=f"{leaked}  {number}"), f"copy{number}", "a") for number in range(20)]
    split = split_texts([*texts, copy, *copies], 100, seed=0, tokens_of=tokens_of)
    held_out = [shingles(tokens_of(plain_words(text))) for text in split.held_out]
    assert split.num_removed > 0
    assert all(
        jaccard(shingles(tokens_of(plain_words(text))), other) < 0.7
        for text in split.train
        for other in held_out
    )


def test_text_of_copies_alone_is_refused() -> None:
    texts = [PublicText(Example(text=" ".join(WORDS)), f"{row}", "a") for row in range(5)]
    with pytest.raises(NoDataError, match="nearly a copy"):
        split_texts(texts, 10, seed=0, tokens_of=tokens_of)
