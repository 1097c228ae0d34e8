import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.layout import AdapterLayout, AdapterState, LoraMatrix, initial_adapter
from fedllm.config.run_config import RunConfig
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import write_manifest
from fedllm.plan.run_plan import fixed_keys
from fedllm.privacy.accounting import Charge
from fedllm.privacy.ledger import Entry, Ledger
from fedllm.runs.checkpoint import (
    ServerState,
    check_resumable,
    load_checkpoint,
    newest_checkpoint,
    newest_round,
    rounds_to_keep,
    save_checkpoint,
)
from fedllm.runs.records import AggregationRecord, OptimizerState, RoundRecord

LAYOUT = AdapterLayout((LoraMatrix("a", 3, 5), LoraMatrix("b.c", 4, 2)), 2, 4.0, "f" * 64)
# factor means, so that every other key may be changed alone
CONFIG = RunConfig.from_flat({"aggregation.read-out": "factor-mean"})


def state_of(round_num: int) -> ServerState:
    records = tuple(
        RoundRecord(
            round_num=number, accepted=("a",), lost={"b": "why"}, aggregation=AggregationRecord(rho=0.5)
        )
        for number in range(round_num + 1)
    )
    pair = (torch.full((5, round_num), 0.5), torch.full((round_num, 3), -2.0))
    return ServerState(
        round_num,
        initial_adapter(LAYOUT, round_num),
        {"a": 4 * round_num, "b": 1},
        records,
        base_delta=BaseDelta(LAYOUT, (pair, (torch.zeros(2, 0), torch.zeros(0, 4)))),
        optimizer=OptimizerState(torch.arange(LAYOUT.size) / 7, torch.ones(LAYOUT.size), round_num),
        norms=(0.1, 1 / 3, float(round_num)),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for round_num in (1, 2, 3):
        save_checkpoint(tmp_path, state_of(round_num), CONFIG.to_flat())
    return tmp_path


def load(folder: Path, config: RunConfig = CONFIG, layout: AdapterLayout = LAYOUT) -> Any:
    return load_checkpoint(folder, fixed_keys(config), layout)


def test_a_state_comes_back_bit_for_bit(folder: Path) -> None:
    state, passed_over = load(folder)
    assert passed_over == []
    assert state.adapter.digest == state_of(3).adapter.digest
    expected = state_of(3)
    assert (state.round_num, state.num_drawn, state.records) == (3, {"a": 12, "b": 1}, expected.records)
    assert state.base_delta.digest == expected.base_delta.digest != ""
    assert torch.equal(state.optimizer.first, expected.optimizer.first)
    assert state.optimizer.num_steps == 3
    assert state.norms == expected.norms


def test_a_state_without_base_delta_or_moments_has_no_file(tmp_path: Path) -> None:
    plain = ServerState(1, initial_adapter(LAYOUT, 1))
    save_checkpoint(tmp_path, plain, CONFIG.to_flat())
    names = {path.name for path in (tmp_path / "round-00001").iterdir()}
    assert names == {"state.json", "adapter.safetensors", "manifest.json"}
    state, _ = load(tmp_path)
    assert (state.base_delta.digest, state.base_delta.size, state.norms) == ("", 0, ())
    assert (state.optimizer.num_steps, state.optimizer.first.numel()) == (0, 0)


def test_control_variates_come_back_checked_like_the_adapter(tmp_path: Path) -> None:
    control = AdapterState(LAYOUT, torch.randn(LAYOUT.size))
    for round_num in (1, 2):
        save_checkpoint(tmp_path, replace(state_of(round_num), control=control), CONFIG.to_flat())
    assert load(tmp_path)[0].control.digest == control.digest
    _flip("control.safetensors")(tmp_path / "round-00002")
    state, (line,) = load(tmp_path)
    assert (state.round_num, state.control.digest) == (1, control.digest)
    assert line.startswith("round-00002 is damaged")


def _flip(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 1
        (path / name).write_bytes(content)

    return damage


def _cut(name: str) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, 10)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


DAMAGES = [
    damage(name)
    for damage in (_flip, _cut, _remove)
    for name in (
        "state.json",
        "adapter.safetensors",
        "base-delta.safetensors",
        "optimizer.safetensors",
        "manifest.json",
    )
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_costs_one_round(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder / "round-00003")
    state, (line,) = load(folder)
    assert state.round_num == 2
    assert state.adapter.digest == state_of(2).adapter.digest
    assert line.startswith("round-00003 is damaged")
    assert "\n" not in line


def test_damaged_checkpoints_alone_name_a_way_out_that_works(folder: Path) -> None:
    for name in ("round-00001", "round-00002", "round-00003"):
        _flip("adapter.safetensors")(folder / name)
    with pytest.raises(CheckpointError, match=r"round-00003 is damaged .* another run\.name"):
        load(folder)


def _rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what `state.json` says, as another version would have written it: with a manifest that fits."""
    content = json.loads((path / "state.json").read_text())
    change(content)
    (path / "state.json").write_text(json.dumps(content))
    write_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("norms"),
        lambda content: content["records"][0].update(unheard=1),
        lambda content: content.update(records=[3]),
    ],
)
def test_a_checkpoint_of_another_version_is_not_damaged(change: Callable, folder: Path) -> None:
    for name in ("round-00001", "round-00002", "round-00003"):
        _rewrite(folder / name, change)
    with pytest.raises(CheckpointError, match="written by another version") as caught:
        load(folder)
    assert "damaged" not in str(caught.value)


def test_keys_that_a_checkpoint_lacks_are_of_another_version(folder: Path) -> None:
    for name in ("round-00001", "round-00002", "round-00003"):
        _rewrite(folder / name, lambda content: content["config"].pop("train.local-steps"))
    for read in (load, lambda folder: check_resumable(folder, fixed_keys(CONFIG))):
        with pytest.raises(ConfigError, match=r"another version .* train\.local-steps"):
            read(folder)


def test_a_checkpoint_that_was_not_finished_is_no_round(tmp_path: Path) -> None:
    (tmp_path / ".round-00001-abc").mkdir()
    (tmp_path / "round-00007.bak").mkdir()
    assert newest_round(tmp_path) == newest_round(tmp_path / "absent") == 0
    save_checkpoint(tmp_path, state_of(2), CONFIG.to_flat())
    assert newest_round(tmp_path) == 2
    assert sorted(path.name for path in tmp_path.glob("round*")) == ["round-00002", "round-00007.bak"]


def turns(*asked: str) -> list[RoundRecord]:
    return [RoundRecord(round_num=number, asked=tuple(names)) for number, names in enumerate(asked)]


def test_the_newest_two_first_turns_and_powers_of_two_are_kept() -> None:
    records = turns("", "a", "a", "ab", "b", "a", "b", "ca", "a", "b", "d", "a", "c", "d")
    assert rounds_to_keep(range(1, 14), records, 99) == {1, 2, 4, 6, 8, 9, 12, 13}
    assert rounds_to_keep([1], records[:2], 99) == {1}
    assert rounds_to_keep([], [], 99) == set()


def test_of_too_many_checkpoints_those_near_another_go() -> None:
    records = turns("", *"abcdefghijklmnopqrst")  # a newcomer a round
    for most in range(12):
        kept = rounds_to_keep(range(1, 21), records, most)
        assert len(kept) == most + 2
        assert kept >= {19, 20}
    assert rounds_to_keep(range(1, 21), records, 4) == {4, 8, 12, 16, 19, 20}


def test_what_is_kept_does_not_depend_on_a_kill(tmp_path: Path) -> None:
    records = turns("", "a", "a", "ab", "a", "c", "a", "b", "d", "a")
    for name, killed in (("whole", 0), ("killed", 6)):
        for number in range(1, 10):
            state = replace(state_of(number), records=tuple(records[: number + 1]))
            save_checkpoint(tmp_path / name, state, CONFIG.to_flat())
            if number == killed:  # the round was done and its checkpoint lost: it is done again
                shutil.rmtree(tmp_path / name / f"round-{number:05d}")
                save_checkpoint(tmp_path / name, state, CONFIG.to_flat())
    found = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "killed")]
    assert found[0] == found[1] == {f"round-{number:05d}" for number in (1, 2, 4, 7, 8, 9)}


def test_earlier_checkpoints_take_no_more_than_their_share_of_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedllm.runs.checkpoint.MOST_BYTES", 30_000)
    for number in range(1, 30):
        records = tuple(turns("", *(chr(65 + one) for one in range(number))))
        save_checkpoint(tmp_path, replace(state_of(number), records=records), CONFIG.to_flat())
        sizes = [
            sum(file.stat().st_size for file in path.iterdir()) for path in sorted(tmp_path.glob("round*"))
        ]
        assert sum(sizes[:-2]) <= 30_000
    assert len(sizes) > 2


def test_a_run_goes_back_to_the_newest_intact_round_before_one(folder: Path) -> None:
    assert newest_checkpoint(folder, 2)[0].round_num == 2
    _flip("adapter.safetensors")(folder / "round-00002")
    state, (line,) = newest_checkpoint(folder, 2)
    assert state.round_num == 1
    assert line.startswith("round-00002 is damaged")
    with pytest.raises(CheckpointError):
        newest_checkpoint(folder, 0)


def another(config: RunConfig, key: str) -> Any:
    """Return another allowed value for a key."""
    value = config.to_flat()[key]
    choices = {
        "train.schedule": "cosine",
        "model.dtype": "float64",
        "model.quantization": "8bit",
        "data.on-bad-row": "stop",
        "train.proximal": "product:0.1",
        "train.clip-norm": "off",
        "train.token-budget": 1,
        "model.num-threads": 2,
        "data.max-rows": 9,
        "data.licences": "MIT",
        "data.columns": "text=body",
        "aggregation.preset": "fedit",
        "aggregation.read-out": "svd",
        "aggregation.train": "b",
        "aggregation.robust": "norm-clip",
        "aggregation.optimizer": "fedavgm:momentum=0.5",
        "lora.init-a": "orthonormal",
        "lora.client-ranks": "4",
        "aggregation.weighting": "tokens",
        "run.purpose": "research",
        "track.to": "trackio",
        "personal.mode": "ditto",
        "distill.when": "every",
        "distill.teacher": "uniform",
        "distill.originality": "on",
        "distill.gate": "clients",
        "wire.codec": "int8",
        "federation.selection": "oort",
        "federation.cohort": 0.5,
        "federation.round-deadline": 30.0,
        "evaluation.every": 2,
        "privacy.epsilon": 8.0,
        "privacy.noise-multiplier": 1.5,
        "privacy.max-participations": 2,
        "privacy.weight-cap": 9.0,
        "federation.min-clients": 2,
        "federation.over-selection": 1.3,
        "privacy.unit": "client",
        "privacy.trust": "local",
        "privacy.metrics": "all",
        "secure.method": "masks",
    }
    if key in choices:
        return choices[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    return value + 1 if isinstance(value, int) else value / 2 + 0.25


# Keys that change where, how long or how loudly a run runs, and never what a round computes.
FREE = """
run.name run.output run.resume model.device model.num-threads
federation.num-rounds federation.round-deadline federation.join-deadline federation.sites
federation.max-retries federation.max-failure-rate
evaluation.every evaluation.prompts evaluation.max-new-tokens track.to
"""
PRIVATE = {"privacy.epsilon": 8.0, "privacy.unit": "client", "aggregation.weighting": "uniform"}


@pytest.mark.parametrize("key", list(CONFIG.to_flat()))
def test_a_run_continues_only_with_its_first_configuration(key: str, folder: Path) -> None:
    before = CONFIG
    if key == "privacy.noise-multiplier":  # it needs a budget
        before = CONFIG.override(PRIVATE)
        shutil.rmtree(folder)
        save_checkpoint(folder, state_of(3), before.to_flat())
    config = before.override({key: another(before, key)})
    if key in FREE.split():
        assert load(folder, config)[0].round_num == 3
    else:
        with pytest.raises(
            ConfigError, match=f"cannot resume with another configuration: {key} was"
        ) as caught:
            load(folder, config)
        assert "\n" not in str(caught.value)


def test_a_cosine_run_keeps_its_number_of_rounds(tmp_path: Path) -> None:
    cosine = RunConfig.from_flat({"train.schedule": "cosine"})
    save_checkpoint(tmp_path, state_of(1), cosine.to_flat())
    with pytest.raises(ConfigError, match=r"federation\.num-rounds was 3, now 5"):
        load(tmp_path, cosine.override({"federation.num-rounds": 5}))


def test_calibrated_noise_keeps_its_number_of_rounds(tmp_path: Path) -> None:
    private = RunConfig.from_flat({"privacy.epsilon": 8.0})
    save_checkpoint(tmp_path / "a", state_of(1), private.to_flat())
    with pytest.raises(ConfigError, match=r"federation\.num-rounds was 3, now 5"):
        load(tmp_path / "a", private.override({"federation.num-rounds": 5}))
    given = private.override({"privacy.noise-multiplier": 2.0})
    save_checkpoint(tmp_path / "b", state_of(1), given.to_flat())
    assert load(tmp_path / "b", given.override({"federation.num-rounds": 5}))[0].round_num == 1


def test_the_ledger_and_the_clip_come_back(tmp_path: Path) -> None:
    entry = Entry(1, 2, "digest", {"anna": Charge(1.5, 0.25, 7)})
    state = replace(state_of(1), ledger=Ledger((entry,)), clip=0.375)
    save_checkpoint(tmp_path, state, CONFIG.to_flat())
    found, _ = load(tmp_path)
    assert (found.ledger, found.clip) == (state.ledger, 0.375)


@pytest.mark.parametrize("changes", [{"fingerprint": "0" * 64}, {"rank": 3}, {"alpha": 1.0}])
def test_a_run_continues_only_on_its_own_base_model_and_layout(changes: dict[str, Any], folder: Path) -> None:
    with pytest.raises(ConfigError, match="another base model or adapter layout"):
        load(folder, layout=replace(LAYOUT, **changes))


def test_a_full_disk_leaves_the_earlier_checkpoints_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(CheckpointError, match=r"round 4 could not be saved in .*No space left") as caught:
            save_checkpoint(folder, state_of(4), CONFIG.to_flat())
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["round-00002", "round-00003"]
    assert load(folder)[0].round_num == 3
    save_checkpoint(folder, state_of(4), CONFIG.to_flat())
    assert load(folder)[0].round_num == 4


def test_an_adapter_that_is_not_finite_is_never_resumed_from(folder: Path) -> None:
    bad = AdapterState(LAYOUT, torch.full((LAYOUT.size,), torch.inf))
    save_checkpoint(folder, replace(state_of(4), adapter=bad), CONFIG.to_flat())
    state, (line,) = load(folder)
    assert state.round_num == 3
    assert "round-00004 is damaged" in line


@pytest.mark.parametrize(
    "changes",
    [
        {
            "base_delta": BaseDelta(
                LAYOUT,
                ((torch.full((5, 1), torch.nan), torch.ones(1, 3)), (torch.zeros(2, 0), torch.zeros(0, 4))),
            )
        },
        {"optimizer": OptimizerState(torch.ones(3), torch.ones(3), 1)},
    ],
    ids=["base delta that is not finite", "moments of another adapter"],
)
def test_a_state_that_cannot_be_is_never_resumed_from(changes: dict[str, Any], folder: Path) -> None:
    save_checkpoint(folder, replace(state_of(4), **changes), CONFIG.to_flat())
    state, (line,) = load(folder)
    assert state.round_num == 3
    assert "round-00004 is damaged" in line
