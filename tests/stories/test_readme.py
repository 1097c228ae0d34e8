"""The README's round by round example runs as it stands there, on a tiny model."""

import json
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_python_example_runs(make_model_folder, tmp_path, monkeypatch, capsys):
    rows = [{"text": f"Return the list {n}.", "client": f"client-{n % 4}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    tiny = {"model.name": str(make_model_folder("llama")), "data.source": "rows.jsonl", "run.name": "readme"}
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    exec(block.replace("from_flat({", f"from_flat({{**{tiny!r}, "), {})
    round_num, loss, digest = capsys.readouterr().out.split()
    assert (round_num, len(digest)) == ("1", 64)
    assert float(loss) > 0
