import json
import math
import os
import stat
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.data.partition import (
    Partition,
    changed_clients,
    is_client_id,
    load_partition,
    make_partition,
    partition_rows,
    save_partition,
)
from fedllm.errors import ConfigError, DataError, IntegrityError
from tests.data.builders import SECRET

laws = settings(deadline=None, max_examples=60)

rows_with_labels = st.lists(
    st.fixed_dictionaries({"label": st.sampled_from([*"abcde", 1, None, "", "odd value"])}), max_size=60
)
drawn_specs = st.sampled_from(
    ["iid", "dirichlet:label:0.01", "dirichlet:label:1", "dirichlet:label:1e9", "quantity:0.5", "quantity:9"]
)


def labelled(text: str) -> list[dict[str, Any]]:
    return [{"label": letter} for letter in text]


def has_label(rows: list[dict[str, Any]]) -> list[int]:
    return [index for index, row in enumerate(rows) if row["label"] not in (None, "")]


@laws
@given(rows_with_labels, drawn_specs, st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_drawn_partition_is_disjoint_complete_and_deterministic(
    rows: list[dict[str, Any]], spec: str, num_clients: int, seed: int
) -> None:
    owned = has_label(rows) if spec.startswith("dirichlet") else list(range(len(rows)))
    if spec.startswith("dirichlet") and not owned:
        return
    if len(owned) < num_clients:
        with pytest.raises(ConfigError, match=rf"deals {len(owned)} rows.*set federation\.num-clients"):
            partition_rows(rows, spec, num_clients=num_clients, seed=seed)
        return
    partition = partition_rows(rows, spec, num_clients=num_clients, seed=seed)
    assert partition == partition_rows(rows, spec, num_clients=num_clients, seed=seed)
    assert len(partition.client_ids) == len(set(partition.client_ids)) == num_clients
    assert sorted(index for indices in partition.indices for index in indices) == owned
    assert all(list(indices) == sorted(indices) for indices in partition.indices)
    assert all(partition.indices)


@laws
@given(rows_with_labels, st.integers(1, 6), st.integers(0, 99))
def test_a_column_partition_gives_each_client_one_value(
    rows: list[dict[str, Any]], num_clients: int, seed: int
) -> None:
    counts = Counter(str(rows[index]["label"]) for index in has_label(rows))
    if len(counts) < num_clients:
        with pytest.raises((ConfigError, DataError)):
            partition_rows(rows, "column:label", num_clients=num_clients, seed=seed)
        return
    partition = partition_rows(rows, "column:label", num_clients=num_clients, seed=seed)
    assert list(partition.client_ids) == sorted(set(partition.client_ids))
    values = [{str(rows[index]["label"]) for index in indices} for indices in partition.indices]
    assert all(len(value) == 1 for value in values)
    sizes = [len(indices) for indices in partition.indices]
    assert sorted(sizes, reverse=True) == [size for _, size in counts.most_common(num_clients)]


@laws
@given(st.integers(20, 200), st.integers(1, 20), st.integers(0, 99))
def test_iid_sizes_differ_by_one_row_at_most(num_rows: int, num_clients: int, seed: int) -> None:
    partition = partition_rows(labelled("a" * num_rows), "iid", num_clients=num_clients, seed=seed)
    sizes = [len(indices) for indices in partition.indices]
    assert max(sizes) - min(sizes) <= 1


def test_the_seed_and_the_form_change_a_drawn_partition() -> None:
    rows = labelled("abcd" * 20)
    specs = ("iid", "quantity:1", "dirichlet:label:1")
    digests = {
        partition_rows(rows, spec, num_clients=4, seed=seed).digest for spec in specs for seed in (0, 1)
    }
    assert len(digests) == 6


def test_larger_alpha_is_more_even() -> None:
    rows = labelled("ab" * 200)

    def purity(alpha: float) -> float:
        """Mean share of a client's commonest label, from 0.5 (even) to 1."""
        shares = []
        for seed in range(5):
            partition = partition_rows(rows, f"dirichlet:label:{alpha}", num_clients=4, seed=seed)
            for indices in partition.indices:
                counts = Counter(rows[index]["label"] for index in indices)
                shares.append(max(counts.values()) / len(indices))
        return sum(shares) / len(shares)

    assert purity(0.05) > purity(1) > purity(1000)


def test_larger_skew_is_less_even_and_follows_the_power_law() -> None:
    rows = labelled("a" * 700)

    def sizes(skew: float) -> list[int]:
        partition = partition_rows(rows, f"quantity:{skew}", num_clients=3, seed=1)
        return sorted((len(indices) for indices in partition.indices), reverse=True)

    assert sizes(2) == [514, 129, 57]  # 700 / (1 + 1/4 + 1/9) times 1, 1/4 and 1/9
    assert sizes(0.001)[0] < sizes(1)[0] < sizes(2)[0]


def named(*labels: object) -> Partition:
    rows = [{"label": label} for label in labels]
    return partition_rows(rows, "column:label", num_clients=len(labels), seed=0)


def test_clients_of_a_column_keep_printable_values_as_names() -> None:
    labels = ("Gloucester", "King Henry", "Zoë & Ümit (ward 3)", "서울 병원", "O’Neill", "7", "client-0001")
    partition = named(*labels)
    assert partition.client_ids == tuple(sorted(labels))
    assert partition.values == {}


@pytest.mark.parametrize(
    "label",
    [
        *(
            "a/b",
            "..",
            ".x",
            "-x",
            "a\\b",
            "a:b",
            "[red]",
            "x" * 65,
            "a\x07b",
            "a\u202eb",
            "a\u200bb",
            "\ud800",
        )
    ],
)
def test_a_value_that_cannot_be_a_name_is_kept_next_to_it(label: str) -> None:
    partition = named(label, "client-0000", "client-0001")
    (name,) = partition.values
    assert partition.values == {name: label}
    assert is_client_id(name)
    assert partition.client_ids == tuple(sorted({"client-0000", "client-0001", name}))
    assert len(partition.client_ids) == 3
    assert partition.indices[partition.client_ids.index(name)] == (0,)


def test_values_that_a_disk_may_take_for_one_have_two_names() -> None:
    decomposed = "Zoe\u0308"
    partition = named("Anna", "anna", " anna ", "Zo\u00eb", decomposed, "Mu\u0308ller")
    assert set(partition.client_ids) > {"Anna", "Zo\u00eb", "M\u00fcller"}
    folded = {unicodedata.normalize("NFKC", name).casefold() for name in partition.client_ids}
    assert len(folded) == 6
    assert set(partition.values.values()) == {"anna", " anna ", decomposed, "Mu\u0308ller"}


def test_a_number_that_is_missing_belongs_to_nobody() -> None:
    rows = [{"label": 1.0}, {"label": math.nan}, {"label": 2.0}]
    partition = partition_rows(rows, "column:label", num_clients=2, seed=0)
    assert partition.indices == ((0,), (2,))


def test_of_more_values_than_clients_the_largest_stay() -> None:
    partition = partition_rows(labelled("abbcccdd"), "column:label", num_clients=2, seed=0)
    assert partition.client_ids == ("b", "c")  # b and d tie
    assert partition.indices == ((1, 2), (3, 4, 5))


def test_fewer_values_than_clients_are_refused_with_their_number() -> None:
    with pytest.raises(ConfigError, match=r"has 2 values; set federation\.num-clients to 2") as caught:
        partition_rows([{"label": SECRET}, {"label": "b"}], "column:label", num_clients=3, seed=0)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("spec", ["column:owner", "dirichlet:owner:1"])
def test_a_column_that_no_row_has_is_named_with_those_present(spec: str) -> None:
    with pytest.raises(DataError) as caught:
        partition_rows([{"label": SECRET, "text": SECRET}], spec, num_clients=1, seed=0)
    assert "'owner'" in str(caught.value)
    assert "(label, text)" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "column",
        "column:",
        "iid:",
        "iid:3",
        "IID",
        "dirichlet",
        "dirichlet:label",
        "dirichlet::1",
        "shards:2",
    ]
    + [f"dirichlet:label:{number}" for number in ("", "0", "-1", "nan", "inf", "x")]
    + [f"quantity:{number}" for number in ("", "0", "-1", "nan", "inf", "x")],
)
def test_a_malformed_spec_names_the_four_forms(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        partition_rows(labelled("ab"), spec, num_clients=1, seed=0)
    assert all(
        form in str(caught.value) for form in ("column:NAME", "iid", "dirichlet:NAME:ALPHA", "quantity:SKEW")
    )


def test_no_clients_at_all_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"federation\.num-clients"):
        partition_rows(labelled("ab"), "iid", num_clients=0, seed=0)


owners = st.lists(st.lists(st.integers(0, 50), max_size=6, unique=True), max_size=4)


@laws
@given(owners, owners)
def test_the_digest_changes_with_the_content_and_only_with_it(
    first: list[list[int]], second: list[list[int]]
) -> None:
    one, two = (
        make_partition([f"c{number}" for number in range(len(owned))], owned) for owned in (first, second)
    )
    same = (one.client_ids, one.indices) == (two.client_ids, two.indices)
    assert (one.digest == two.digest) == same


def test_the_digest_is_pinned_so_that_versions_agree() -> None:
    assert make_partition(["a", "b"], [[1, 0], []]).digest == (
        "02296c6dae7ed1a6445eee6f3d41a30a50589294e28af10d8994d5229a8caf84"
    )


def test_a_saved_partition_is_loaded_as_it_was(tmp_path: Path) -> None:
    partition = partition_rows(labelled("abcab"), "iid", num_clients=5, seed=3)
    save_partition(tmp_path / "partition.json", partition)
    assert load_partition(tmp_path / "partition.json") == partition


def test_a_saved_partition_keeps_values_for_its_owner_alone(tmp_path: Path) -> None:
    partition = named("a/b", "c")
    save_partition(tmp_path / "partition.json", partition)
    assert load_partition(tmp_path / "partition.json").values == partition.values == {"client-0000": "a/b"}
    assert (tmp_path / "partition.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [{"client_ids": ["x", "b"]}, {"indices": [[0], [2]]}, {"digest": "0" * 64}, {"indices": [[0, 1], []]}],
)
def test_a_changed_partition_file_does_not_match_its_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "partition.json"
    save_partition(path, make_partition(["a", "b"], [[0], [1]]))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IntegrityError, match="digest"):
        load_partition(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"client_ids": 1, "indices": [], "digest": ""}',
        b'{"client_ids": [Infinity',
        b'{"client_ids": [], "indices": [], "digest": "", "values": []}',
    ],
)
def test_a_file_that_is_no_partition_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "partition.json"
    path.write_bytes(content)
    with pytest.raises(IntegrityError, match="not a partition file"):
        load_partition(path)


def test_absent_partition_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        load_partition(tmp_path / "absent.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_partition(tmp_path / "file" / "partition.json", make_partition([], []))


def test_a_saved_partition_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        save_partition(tmp_path / "partition.json", make_partition(["a"], [[0]]))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "partition.json").stat().st_mode) == 0o600


def test_clients_whose_rows_changed_are_named() -> None:
    before = make_partition("abc", [[0], [1], [2]], contents=["x", "y", "z"])
    assert changed_clients(before, before) == []
    assert changed_clients(before, make_partition("abc", [[0], [1], [2]], contents=["x", "Y", "z"])) == ["b"]
    assert changed_clients(before, make_partition("abd", [[0], [3], [2]], contents=["x", "y", "z"])) == [
        "b",
        "c",
        "d",
    ]
    assert (
        make_partition("a", [[0]], contents=["x"]).digest != make_partition("a", [[0]], contents=["y"]).digest
    )
