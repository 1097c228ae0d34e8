"""The three studies end to end, as small as they can be."""

import importlib.util
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fedllm.errors import MissingExtraError
from scripts.experiments.aggregation.main import KINDS, Options, do_studies, draw, main
from scripts.experiments.aggregation.methods import METHODS, MethodsGrid
from scripts.experiments.aggregation.poison import PoisonGrid, goals
from scripts.experiments.aggregation.rho_map import MapGrid
from scripts.experiments.aggregation.sizes import FULL, QUICK, SMOLLM2, Size
from scripts.experiments.options import EMBEDDED, size_of
from scripts.reports import report
from scripts.studies.trials import Setting, TrialRunner, open_pool

THREE = {
    "federation.num-clients": 3,
    "data.partition": "column:domain",
    "federation.num-rounds": 2,
    "train.local-steps": 1,
}
TINY = Size(
    flat={},
    rows_of_domain=12,
    methods=MethodsGrid(
        flat=THREE,
        rates=(0.003, 0.01),
        tuning_seed=0,
        seeds=(1, 2),
        methods={
            "fedit": {"aggregation.read-out": "factor-mean"},
            "unheard of": {"aggregation.read-out": "none such"},
        },
    ),
    rho_map=MapGrid({}, clients=(2,), local_steps=(1, 3), rates=(0.01,), skews=("iid", "domain"), seeds=(1,)),
    poison=PoisonGrid(
        flat={"federation.num-clients": 3, "federation.max-retries": 0},
        skews=("iid",),
        attacks={"huge flip": (1,), "flip within bound": (1,)},
        rules={"none": {}},
        seed=1,
        backdoors={"": (1,)},
        probes=2,
    ),
)


@pytest.fixture(scope="module")
def done(tiny_setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, TrialRunner]:
    """The figures of all studies, what was printed and where it was done."""
    journal = tmp_path_factory.mktemp("work") / "trials.jsonl"
    runner = TrialRunner(tiny_setting, KINDS, journal, "abc")
    printed = io.StringIO()
    figures = do_studies(TINY, "all", runner, Console(file=printed, width=200))
    return figures, printed.getvalue(), runner


def test_every_study_has_its_figures_and_its_tables(done: tuple[dict, str, TrialRunner]) -> None:
    figures, printed, _ = done
    rows = figures["methods"]["tables"]["domain"]
    assert set(rows) == {"fedit", "local only", "centralised", "one-shot"}
    assert rows["fedit"]["seeds"] == 2
    assert figures["methods"]["left_out"]["unheard of"].startswith("refused: aggregation.read-out")
    assert len(figures["rho_map"]["points"]) == 4
    assert all("gap" in point for point in figures["rho_map"]["points"])
    huge = figures["poison"]["tables"]["iid"]["huge flip x1"]["none"]
    assert huge["lost"] == 1
    assert "centralised" in printed
    assert "flip within bound x1" in printed
    json.dumps(report("aggregation", figures, goals(figures["poison"])), allow_nan=False)


def test_a_study_that_is_done_again_does_nothing(done: tuple[dict, str, TrialRunner]) -> None:
    figures, _, runner = done
    fresh = TrialRunner(runner.setting, {}, runner.journal, "abc")  # no kind of trial could be done
    again = do_studies(
        replace(TINY, methods=replace(TINY.methods, methods={})), "all", fresh, Console(quiet=True)
    )
    assert again["rho_map"] == figures["rho_map"]
    assert again["poison"] == figures["poison"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_every_study_is_drawn(done: tuple[dict, str, TrialRunner], tmp_path: Path) -> None:
    draw(done[0], tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "aggregation_methods.svg",
        "aggregation_rho_gap.svg",
        "aggregation_rho.svg",
    }


@pytest.mark.soak
def test_two_processes_give_what_one_gives(done: tuple[dict, str, TrialRunner], tmp_path: Path) -> None:
    _, _, alone = done
    size = replace(TINY, rho_map=replace(TINY.rho_map, local_steps=(1,), skews=("iid",)))
    with open_pool(2) as pool:
        together = replace(alone, journal=tmp_path / "trials.jsonl", pool=pool)
        found = [do_studies(size, "b", runner, Console(quiet=True)) for runner in (alone, together)]
    assert found[0] == found[1]


def test_without_matplotlib_a_plot_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'fedllm\[bench\]'"):
        main(Options(plot=tmp_path, work=tmp_path / "work"))
    assert not (tmp_path / "work").exists()


def test_sizes_hold_every_method_and_keep_the_tuning_seed_apart() -> None:
    asked = ((Options(), FULL), (Options(quick=True), QUICK), (Options(model=EMBEDDED, quick=True), SMOLLM2))
    for options, size in asked:
        assert size_of(options, full=FULL, quick=QUICK, embedded=SMOLLM2) is size
    for size in (FULL, QUICK, SMOLLM2):
        assert size.methods.tuning_seed not in size.methods.seeds
    assert set(FULL.methods.methods) == set(METHODS)
    assert len(FULL.methods.rates) == len(FULL.methods.seeds) == 3
