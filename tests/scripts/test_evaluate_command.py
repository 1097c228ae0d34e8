"""What `fedllm evaluate` takes from the files of a run."""

from pathlib import Path

import pytest

from scripts.finished_run import trained_clients


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"held_out": {"after": {"clients": {"anna": 1.0, "ben": 2.0}}}}', ["anna", "ben"]),
        ('{"held_out": null}', []),
        ('{"held_out": {"after": {"clients": 3}}}', []),
        ("[]", []),
        ("{", []),
    ],
)
def test_a_malformed_result_names_no_clients(text: str, names: list[str], tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert trained_clients(tmp_path) == names
