"""What `fedllm doctor --site` prints: every key in force, and every field that will leave."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from clients.withdrawn import withdraw
from fedllm.errors import PolicyError
from fedllm.identity import new_key, public_text
from fedllm.messages import EVALUATION_METRICS, UPDATE_METRICS
from fedllm.models.files import content_digest
from fedllm.site_policy import load_policy
from scripts.commands.doctor_site import doctor_site


@pytest.fixture
def told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    def show(text: str) -> str:
        (tmp_path / "site.toml").write_text(text)
        monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
        doctor_site()
        return capsys.readouterr().out

    return show


def test_every_key_is_shown_with_its_value(told: Callable[[str], str], tmp_path: Path) -> None:
    text = told('[limits]\nsteps = 8000000\n[allow]\nservers = ["fl:1"]')
    policy = load_policy()
    for table in (policy.site, policy.allow, policy.limits, policy.budget):
        for item in fields(table):
            assert f"  {item.name.replace('_', '-')} = " in text
    assert "  steps = 8000000\n" in text
    assert '  servers = ["fl:1"]\n' in text
    assert "  rank = 0  (default)\n" in text
    assert "[peers]" not in text
    public = public_text(new_key(tmp_path / "key"))
    peers = f'[peers]\nnorth = "{public}"'
    assert peers.replace("north", "  north") in told(f'[site]\nkey = "key"\n{peers}')


def test_what_has_withdrawn_is_shown_first(told: Callable[[str], str], tmp_path: Path) -> None:
    new_key(tmp_path / "key")
    text = '[site]\nkey = "key"\nstate-path = "state"\n[nodes.ward]\n'
    assert "has withdrawn:" not in told(text).partition("[site]")[0]
    for node in ("ward", ""):
        withdraw(load_policy(), node, "", tmp_path / "log")
    said = told(text).partition("[site]")[0]
    assert "node ward has withdrawn: nothing leaves" in said
    assert "this site has withdrawn: nothing leaves" in said


def test_every_field_that_leaves_is_shown(told: Callable[[str], str]) -> None:
    text = told("")
    for name in (*UPDATE_METRICS, *EVALUATION_METRICS):
        assert f"metrics.{name}" in text
    for name in ("updates.CLIENT", "clients.fingerprints", "metrics.num-examples", "arrays.TENSOR"):
        assert name in text
    assert "powers of two" not in text
    assert "powers of two" in told("[budget]\nepsilon = 1")
    few = told('[allow]\nmessages = ["join"]')
    assert "train: nothing, it is not answered" in few
    assert "updates.CLIENT" not in few


def test_where_secret_sums_are_required_no_plain_field_is_shown(
    told: Callable[[str], str], tmp_path: Path
) -> None:
    public = public_text(new_key(tmp_path / "site.key"))
    text = told(
        '[site]\nkey = "site.key"\n[allow]\nsecure-aggregation = "required"\nbundles = ["ab"]\n'
        f'[peers]\nnorth = "{public}"'
    )
    for name in ("masked.CLIENT", "openings.CLIENT", "secure.keys", "metrics.num-examples"):
        assert name in text
    for name in ("updates.CLIENT", "sum.sum", "metrics.train_loss", "arrays.TENSOR"):
        assert name not in text


def test_a_node_is_shown_with_the_hash_of_its_model(
    told: Callable[[str], str], make_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").touch()
    model = make_model_folder()
    text = told(f'[nodes.ward]\ndata = "rows.jsonl"\nmodel-path = "{model}"')
    assert f'"sha256:{content_digest(model)}"' in text
    with pytest.raises(PolicyError, match=r"other\.jsonl does not exist"):
        told('[nodes.ward]\ndata = "other.jsonl"')
