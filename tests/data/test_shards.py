import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.config.keys import DataConfig
from fedllm.data.fields import ClientRows
from fedllm.data.shards import draw_rows, load_one_client, load_shards
from fedllm.errors import ConfigError, DataError, NoDataError, RowsLostError
from tests.data.builders import SECRET

laws = settings(deadline=None, max_examples=60)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", **more} for number in range(count)]


def one_client(path: str, *, seed: int = 0, client_id: str = "c", **options: Any) -> ClientRows:
    return load_one_client(path, DataConfig(**options), client_id=client_id, seed=seed).client


@pytest.mark.parametrize(
    ("rows", "fraction", "most", "expected"),
    [
        (20, 0.1, 64, 2),
        (14, 0.1, 64, 1),
        (16, 0.1, 64, 2),
        (3, 0.1, 64, 1),
        (2, 0.1, 64, 1),
        (2, 0.9, 64, 1),
        (1, 0.5, 64, 0),
        (20, 0.0, 64, 0),
        (20, 0.5, 0, 0),
        (20, 0.5, 3, 3),
    ],
)
def test_held_out_share_is_rounded_and_capped(
    tmp_path: Path, rows: int, fraction: float, most: int, expected: int
) -> None:
    source = write(tmp_path / "a.jsonl", texts(rows))
    client = one_client(source, held_out_fraction=fraction, max_held_out=most)
    assert len(client.held_out) == expected
    assert len(client.train) == rows - expected
    assert not set(client.train) & set(client.held_out)


def test_a_copy_of_a_held_out_row_is_never_trained_on(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(6) * 5)
    client = one_client(source, held_out_fraction=0.1)
    assert client.train
    assert client.held_out
    assert not set(client.train) & set(client.held_out)


def test_client_of_equal_rows_holds_out_nothing(tmp_path: Path) -> None:
    client = one_client(write(tmp_path / "a.jsonl", texts(1) * 4))
    assert (len(client.train), len(client.held_out)) == (4, 0)


def test_split_depends_on_seed_and_client_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(40))
    assert one_client(source) == one_client(source)
    assert one_client(source).held_out != one_client(source, seed=1).held_out
    assert one_client(source).held_out != one_client(source, client_id="d").held_out


def test_client_alone_splits_its_rows_as_among_others(tmp_path: Path) -> None:
    mine, others = texts(30, client="mine"), texts(20, client="others")
    together = write(tmp_path / "all.jsonl", others[:5] + mine + others[5:])
    shards = load_shards(DataConfig(source=together), num_clients=2, seed=4)
    assert one_client(write(tmp_path / "mine.jsonl", mine), client_id="mine", seed=4) == shards.clients[0]


def test_max_rows_keeps_a_seeded_choice_of_each_client(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(50))
    client, other = (one_client(source, max_rows=10, seed=seed) for seed in (0, 1))
    assert len(client.train) + len(client.held_out) == 10
    assert set(client.train + client.held_out) != set(other.train + other.held_out)
    assert len(one_client(source, max_rows=50).train) == 45


def test_bad_rows_of_both_stages_are_counted_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = write(path, texts(20, client="c"))
    with path.open("a") as file:
        file.write(f'{{"text": "{SECRET}\n')
        for row in (
            {"text": None, "client": "c"},
            {"client": "c"},
            {"text": [SECRET], "client": "c"},
            {"text": SECRET},
        ):
            file.write(json.dumps(row) + "\n")
    shards = load_shards(DataConfig(source=source), num_clients=1, seed=0)
    assert sum(len(client.train) + len(client.held_out) for client in shards.clients) == 20
    assert [(bad.file, bad.line) for bad in shards.bad] == [(source, number) for number in range(21, 26)]
    reasons = [bad.reason for bad in shards.bad]
    assert [reason.split()[-1] for reason in reasons[1:]] == ["null", "missing", "text", "value"]
    assert SECRET not in repr(shards)


def test_a_source_of_which_too_much_is_bad_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*texts(7, client="c"), *[{"text": None, "client": SECRET}] * 2])
    for load in (
        lambda: load_shards(DataConfig(source=source), num_clients=1, seed=0),
        lambda: one_client(source),
    ):
        with pytest.raises(RowsLostError, match="2 of 9 rows cannot be used") as caught:
            load()
        assert "2 x column 'text' is null" in str(caught.value)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("bad", [{"text": None}, {"other": SECRET}, {"text": {"a": SECRET}}, {"text": ""}])
def test_stop_refuses_the_first_bad_row_by_file_and_line(tmp_path: Path, bad: dict[str, Any]) -> None:
    source = write(tmp_path / "a.jsonl", [*texts(2), bad, *texts(2)])
    with pytest.raises(DataError) as caught:
        load_shards(DataConfig(source=source, partition="iid", on_bad_row="stop"), num_clients=1, seed=0)
    assert f"{source}, line 3: column 'text'" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("rows", [[], [{"text": None, "client": "c"}], [{"text": [5], "client": SECRET}]])
def test_a_source_without_a_usable_row_has_no_data(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    source = write(tmp_path / "a.jsonl", rows)
    for load in (
        lambda: load_shards(DataConfig(source=source), num_clients=1, seed=0),
        lambda: one_client(source),
    ):
        with pytest.raises(NoDataError) as caught:
            load()
        assert source in str(caught.value)
        assert not rows or all(part in str(caught.value) for part in ("line 1", "column 'text'"))
        assert SECRET not in str(caught.value)


def test_clients_left_out_or_renamed_are_told_by_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "client": f"{SECRET}/{index % 5}"} for index, row in enumerate(texts(11))]
    source = write(tmp_path / "a.jsonl", rows)
    load_shards(DataConfig(source=source), num_clients=2, seed=0)
    left_out, renamed = caplog.messages
    assert "federation.num-clients = 2" in left_out
    assert "3 of the 5 clients of column 'client' are left out, with 6 of 11 rows" in left_out
    assert "2 clients have a name other" in renamed
    assert SECRET not in caplog.text


def test_a_column_without_a_value_hides_no_other(tmp_path: Path) -> None:
    rows = [{"messages": None, "prompt": f"q{n}", "response": "a"} for n in range(4)]
    client = one_client(write(tmp_path / "a.jsonl", rows))
    assert len(client.train) + len(client.held_out) == 4


def test_a_client_for_every_value_needs_no_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "client": f"ward {index % 3}"} for index, row in enumerate(texts(9))]
    load_shards(DataConfig(source=write(tmp_path / "a.jsonl", rows)), num_clients=3, seed=0)
    assert caplog.messages == []


def test_wrong_partition_column_is_a_wrong_setting(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", texts(2))
    with pytest.raises(DataError, match="'owner'"):
        load_shards(DataConfig(source=source, partition="column:owner"), num_clients=1, seed=0)


def test_malformed_partition_is_refused_before_reading() -> None:
    with pytest.raises(ConfigError, match="expected column:NAME"):
        load_shards(DataConfig(source="absent.jsonl", partition="random"), num_clients=1, seed=0)


def test_one_client_never_asks_the_hub() -> None:
    with pytest.raises(DataError, match="no such file"):
        one_client("squad")


def test_the_mapping_keys_choose_the_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"ask": "q", "tell": "a", "text": "unused"}])
    client = one_client(source, columns="prompt=ask,response=tell")
    assert [turn.content for turn in client.train[0].turns] == ["q", "a"]


draws = {"num_rows": st.integers(1, 40), "seed": st.integers(0, 2**63 - 1), "start": st.integers(0, 200)}


@laws
@given(**draws, first=st.integers(0, 90), second=st.integers(0, 90))
def test_drawing_in_two_parts_is_drawing_at_once(
    num_rows: int, seed: int, start: int, first: int, second: int
) -> None:
    def draw(begin: int, count: int) -> tuple[int, ...]:
        return draw_rows(num_rows, seed=seed, client_id="c", start=begin, count=count)

    assert draw(start, first + second) == draw(start, first) + draw(start + first, second)
    assert len(draw(start, first)) == first


@laws
@given(**draws)
def test_every_row_is_drawn_before_any_is_drawn_twice(num_rows: int, seed: int, start: int) -> None:
    epoch = start - start % num_rows
    drawn = draw_rows(num_rows, seed=seed, client_id="c", start=epoch, count=2 * num_rows)
    assert sorted(drawn[:num_rows]) == sorted(drawn[num_rows:]) == list(range(num_rows))


def test_epochs_clients_and_seeds_draw_in_orders_of_their_own() -> None:
    orders = {
        draw_rows(30, seed=seed, client_id=client_id, start=start, count=30)
        for seed in (0, 1)
        for client_id in ("a", "b")
        for start in (0, 30)
    }
    assert len(orders) == 8


def test_drawing_from_no_rows_is_no_data() -> None:
    with pytest.raises(NoDataError, match="'c'"):
        draw_rows(0, seed=0, client_id="c", start=0, count=1)


@pytest.mark.parametrize("wrong", [{"num_rows": -1}, {"start": -1}, {"count": -1}])
def test_a_negative_argument_is_a_programming_mistake(wrong: dict[str, int]) -> None:
    arguments = {"num_rows": 3, "start": 0, "count": 1} | wrong
    with pytest.raises(ValueError, match="negative"):
        draw_rows(arguments.pop("num_rows"), seed=0, client_id="c", **arguments)
