"""Every mistake a person can make is one line that says what, where and what to do."""

import json
import os
import sys

import pytest

from clients.client_app import app
from fedllm.data.partition import load_partition
from scripts import cli
from scripts.recipe_arguments import config_of
from scripts.runtimes.local import local_grid
from strategies.run import run_federation

SECRET = "patient Zebedee has gout"


@pytest.fixture
def fail(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command in this process and returns its one line of stderr."""

    def run(*words: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["fedllm", *words])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert ended.value.code == code, captured
        lines = captured.err.strip().splitlines()
        assert len(lines) == 1, captured.err
        assert "Traceback" not in captured.err + captured.out
        assert SECRET not in captured.err + captured.out
        return lines[0]

    return run


def _rows(path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {"prompt": "a question", "response": "an answer", "owner": "a"}


def test_unknown_key_names_the_nearest(fail):
    assert "did you mean 'train.local-steps'" in fail("run", "train.local-step=3")


def test_word_without_a_value(fail):
    assert "expected key=value" in fail("run", "train.local-steps")


def test_value_out_of_range_says_what_is_allowed(fail):
    assert "lora.rank" in fail("run", "lora.rank=0")


def test_absent_recipe(fail):
    assert "nowhere.toml" in fail("run", "nowhere.toml")


def test_recipe_that_is_not_toml(fail, tmp_path):
    (tmp_path / "broken.toml").write_text("[train\n")
    assert "broken.toml" in fail("check", "broken.toml")


def test_absent_model(fail, tmp_path):
    line = fail("run", f"model.name={tmp_path}/none", "run.name=x")
    assert "no such folder" in line


def test_bad_row_names_file_and_line_under_stop(fail, tmp_path, tiny_run):
    source = _rows(tmp_path / "rows.jsonl", GOOD, '{"prompt": "' + SECRET + '",\n', GOOD)
    line = fail("check", *tiny_run, f"data.source={source}", "--on-bad-row", "stop")
    assert "rows.jsonl" in line
    assert "line 2" in line


def test_non_utf8_bytes_name_the_line(fail, tmp_path, tiny_run):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff' + SECRET.encode() + b'"}\n')
    line = fail("check", *tiny_run, f"data.source={path}", "--on-bad-row", "stop")
    assert "line 2" in line
    assert "UTF-8" in line


def test_missing_column_is_named(fail, tmp_path, tiny_run):
    source = _rows(tmp_path / "rows.jsonl", GOOD)
    assert "'answer'" in fail(
        "check",
        *tiny_run,
        f"data.source={source}",
        "data.columns=prompt=prompt,response=answer",
    )


def test_unknown_partition_column(fail, tmp_path, tiny_run):
    source = _rows(tmp_path / "rows.jsonl", GOOD)
    assert "hospital" in fail("check", *tiny_run, f"data.source={source}", "data.partition=column:hospital")


def test_absent_data_file(fail, tiny_run):
    assert "rows-of-nobody.jsonl" in fail("check", *tiny_run, "data.source=rows-of-nobody.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(fail, tmp_path, tiny_run):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    assert "cannot write" in fail("run", *tiny_run, "--out", str(closed))


def test_output_below_a_file(fail, tmp_path, tiny_run):
    (tmp_path / "file").write_text("")
    assert "cannot write" in fail("run", *tiny_run, "--out", str(tmp_path / "file"))


def test_earlier_run_is_not_overwritten(fail, tmp_path, tiny_run):
    (tmp_path / "again" / "checkpoints" / "round-00001").mkdir(parents=True)
    assert "--resume" in fail("run", *tiny_run, "run.name=again", "--out", str(tmp_path))


def test_resume_refuses_before_it_prints_anything(fail, tmp_path, tiny_run):
    (tmp_path / "old" / "checkpoints" / "round-00001").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "round-00001" / "state.json").write_text('{"config": {"seed": 1}}')
    line = fail("run", *tiny_run, "run.name=old", "--resume", "--out", str(tmp_path))
    assert "another version" in line


def test_all_labels_cut_off_leaves_no_data(fail, tmp_path, tiny_run):
    long = {"prompt": "word " * 300, "response": "an answer", "owner": "a"}
    source = _rows(tmp_path / "rows.jsonl", *[long] * 4)
    words = [f"data.source={source}", "federation.num-clients=1", "train.max-length=32", "run.name=cut"]
    line = fail("run", *tiny_run, *words, "--out", str(tmp_path))
    assert "0 usable clients joined" in line


@pytest.mark.soak
def test_client_without_data_is_left_out(tiny_run, tmp_path, fedllm):
    """Two of three owners have rows that fit; the third is named, left out, and the run goes on."""
    rows = [{**GOOD, "owner": owner, "prompt": f"q{i}"} for owner in "ab" for i in range(6)]
    rows += [{"prompt": "word " * 300, "response": "an answer", "owner": "c"}] * 3
    source = _rows(tmp_path / "rows.jsonl", *rows)
    words = [f"data.source={source}", "federation.num-clients=3", "train.max-length=32", "run.name=two"]
    done = fedllm("run", *tiny_run, *words, "--out", str(tmp_path))
    assert "client c has no data" in done.stdout
    assert "3 rows lose their whole answer" in done.stdout
    assert "\nrows: 3 of 15 rows are skipped" in done.stdout


def test_bad_rows_are_skipped_and_counted(tiny_run, tmp_path, fedllm):
    rows = [{**GOOD, "prompt": f"q{i}"} for i in range(8)]
    source = _rows(tmp_path / "rows.jsonl", *rows, "not json\n", '{"prompt": null, "response": "x"}\n')
    words = [f"data.source={source}", "data.partition=iid", "federation.num-clients=2", "run.name=skip"]
    done = fedllm("run", *tiny_run, *words, "--out", str(tmp_path))
    assert "2 bad rows skipped: 1 x" in done.stdout
    assert "line 9" in done.stdout
    assert "\nrows: 2 bad rows skipped" in done.stdout
    assert json.loads((tmp_path / "skip" / "result.json").read_text())["rows_lost"] == "2 bad rows skipped"


def test_not_an_adapter(fail, tmp_path):
    assert "neither a run with a complete round nor an adapter folder" in fail("evaluate", str(tmp_path))


def test_flipped_bit_in_the_adapter_is_refused(fail, tmp_path, tiny_run):
    config = config_of([*tiny_run, "run.name=flip", "federation.num-rounds=1", f"run.output={tmp_path}"])
    run_federation(config, local_grid(config, app))
    weights = tmp_path / "flip" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert "adapter_model.safetensors: changed" in fail("evaluate", str(tmp_path / "flip"))


def test_a_finished_run_goes_on_only_with_the_same_rows(fail, tmp_path, tiny_run, fedllm):
    rows = [{**GOOD, "prompt": f"q{i}"} for i in range(8)]
    source = _rows(tmp_path / "rows.jsonl", *rows)
    words = [f"data.source={source}", "data.partition=iid", "federation.num-clients=2", "run.name=more"]
    fedllm("run", *tiny_run, *words, "federation.num-rounds=1", "--out", str(tmp_path))
    assert load_partition(tmp_path / "more" / "partition.json").client_ids == ("client-0000", "client-0001")
    _rows(tmp_path / "rows.jsonl", *rows[:6])
    line = fail("run", *tiny_run, *words, "--resume", "--out", str(tmp_path))
    assert "partition.json" in line
    assert "restore the data" in line
    edited = [{**row, "response": "another"} if row["prompt"] == "q3" else row for row in rows]
    _rows(tmp_path / "rows.jsonl", *edited)
    assert "the rows of client-000" in fail("run", *tiny_run, *words, "--resume", "--out", str(tmp_path))
    assert json.loads((tmp_path / "more" / "result.json").read_text())["status"] == "completed"
