"""`fedllm site forget`: the owner of a machine takes rows back, and its nodes read them no more."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clients.tokens import hosted_rows
from fedllm.config.run_config import RunConfig
from fedllm.errors import ConfigError
from scripts import cli
from scripts.commands import site_forget_command


def test_a_node_of_the_site_reads_rows_taken_back_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "site.toml"
    file.write_text(f'[site]\nstate-path = "{tmp_path / "state"}"\n')
    monkeypatch.setenv("FEDLLM_SITE", str(file))
    rows = [{"question": f"q{number}", "reply": f"r{number}"} for number in range(4)]
    for name, some in (("rows", rows), ("back", rows[1:3])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    columns = "prompt=question,response=reply"
    words = ["site", "forget", str(tmp_path / "back.jsonl"), "--columns", columns]
    told = CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout
    assert told.startswith("2 rows are forgotten here")
    config = RunConfig.from_flat({"data.columns": columns})
    (client,) = hosted_rows(config, {"data-path": str(tmp_path / "rows.jsonl")})
    said = {example.turns[-1].content for example in client.train + client.held_out}
    assert said == {"r0", "r3"}


def test_a_machine_without_site_toml_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_SITE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no site\.toml"):
        site_forget_command.forget(tmp_path / "back.jsonl", columns="", file=None)
