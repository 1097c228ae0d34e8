"""Three sites that require secret sums, a service each, do one run through a real SuperLink."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedllm import chained_log
from fedllm.identity import new_key, public_text
from fedllm.runs.folder import read_rounds
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import superlink, temporary_link
from scripts.runtimes.submitting import submit
from tests import site_builder
from tests.site_builder import started_site, wait_for, write_site
from tests.stories.test_site import bundle_of

NAMES = ("anna", "ben", "cleo")


@pytest.mark.soak
def test_sites_that_require_secret_sums_do_a_run(
    make_model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_builder, "_PATIENCE", 1200.0)
    model = shutil.copytree(make_model_folder(), tmp_path / "model")
    words = ["quickstart.toml", f"model.name={model}", "federation.num-clients=3", "federation.num-rounds=2"]
    words += ["federation.join-deadline=900", "federation.min-clients=3", "model.device=cpu", "lora.rank=2"]
    words += [
        "train.local-steps=2",
        "evaluation.prompts=",
        "distill.when=never",
        f"run.output={tmp_path / 'runs'}",
    ]
    config = config_of([*words, "run.name=masked", "secure.method=masks", "federation.round-deadline=900"])
    keys = {name: public_text(new_key(tmp_path / name / "site.key")) for name in NAMES}
    with ExitStack() as stack:
        link = stack.enter_context(temporary_link(is_hardened=False))
        stack.enter_context(superlink(link))
        allow = {"bundles": [bundle_of(link)], "secure-aggregation": "required"}
        for name in NAMES:
            peers = {other: key for other, key in keys.items() if other != name}
            node = {name: {"model-path": str(model)}}
            site = {"key": "site.key"}
            file = write_site(tmp_path / name, link.address, node, site=site, allow=allow, peers=peers)
            stack.enter_context(started_site(file))
        submit(link, config, {})
        result = tmp_path / "runs" / "masked" / "result.json"
        wait_for(result.exists, "the run's end")
        found = json.loads(result.read_text())
    assert found["status"] == "completed", found
    accepted = [record.accepted for record in read_rounds(result.parent) if record.round_num]
    assert accepted == [NAMES, NAMES]
    for name in NAMES:
        entries = list(chained_log.read_entries(tmp_path / name / "state" / "log.jsonl"))
        assert {entry["code"] for entry in entries} == {"ok"}
        assert [entry["question"] for entry in entries].count("unmask") == 3
        assert not list((tmp_path / name / "state" / "secure").rglob("key"))
