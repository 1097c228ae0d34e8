"""`fedllm site withdraw`: what its owner sees, and what is on disk whatever goes wrong."""

from pathlib import Path

import pytest

from clients.withdrawn import read_withdrawn
from fedllm.chained_log import read_entries
from fedllm.errors import CheckpointError, ConfigError
from fedllm.identity import new_key, public_text
from fedllm.withdrawal import read_withdrawal
from scripts.commands.site_withdraw_command import withdraw_site

REASON = "a private reason"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The site.toml of a site with a key and one node."""
    made = tmp_path / "site.toml"
    made.write_text('[site]\nstate-path = "state"\nkey = "site.key"\n[nodes.ward]\ndata = "ward.jsonl"\n')
    return made


def test_the_owner_gets_the_record_and_the_log_the_reason(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    public, out = public_text(new_key(tmp_path / "site.key")), tmp_path / "withdrawal.json"
    withdraw_site(file, node="ward", reason=REASON, out=out)
    found = read_withdrawal(out.read_bytes())
    assert (found.site, found.clients) == (public, ("ward",))
    assert REASON.encode() not in out.read_bytes()
    (entry,) = read_entries(tmp_path / "state" / "log.jsonl")
    assert (entry["event"], entry["reason"]) == ("withdrawn", REASON)
    assert "node ward has withdrawn" in capsys.readouterr().out


def test_a_record_that_cannot_be_handed_out_binds_all_the_same(file: Path, tmp_path: Path) -> None:
    new_key(tmp_path / "site.key")
    (tmp_path / "taken").write_text("a file, and no folder")
    with pytest.raises(CheckpointError, match=r"the record is in .*withdrawn\.json too"):
        withdraw_site(file, node="", reason="", out=tmp_path / "taken" / "withdrawal.json")
    (kept,) = read_withdrawn(tmp_path / "state")
    assert read_withdrawal(kept.record.encode()).clients == ()


def test_without_a_site_file_there_is_nothing_to_withdraw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_SITE", "")
    with pytest.raises(ConfigError, match=r"no site\.toml"):
        withdraw_site(None, node="", reason="", out=Path("withdrawal.json"))
