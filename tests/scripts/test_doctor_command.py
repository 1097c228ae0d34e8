"""What `fedllm doctor` says of a machine's policy."""

from pathlib import Path

import pytest
import typer

from scripts.commands import doctor_command
from scripts.commands.doctor_command import Finding, policy_finding


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the strict default"),
        (
            "[budget]\nepsilon = 8.0",
            "of each data set, runs together may learn epsilon 8",
        ),
        ('[site]\nstate-path = "/private"', "keeps private state in /private"),
        (
            '[allow]\nserver-paths = true\ntrust-remote-code = ["org/model"]',
            "permits remote code of org/model; permits local paths named by a server",
        ),
    ],
)
def test_every_key_of_a_policy_is_named(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tmp_path / "site.toml"
    policy.write_text(text)
    monkeypatch.setenv("FEDLLM_SITE", str(policy))
    assert policy_finding().detail == said


def test_a_cure_is_printed_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Square brackets are an extra of a package, not a style."""
    broken = Finding("Flower", "fail", "[/red] is no path", "pip install 'flwr[simulation]'")
    monkeypatch.setattr(doctor_command, "flower_finding", lambda: broken)
    with pytest.raises(typer.Exit):
        doctor_command.doctor()
    printed = "".join(capsys.readouterr().out.split())
    assert "flwr[simulation]" in printed
    assert "[/red]" in printed
