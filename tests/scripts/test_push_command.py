"""`fedllm push`: what goes to the hub and what never does, against a small server that speaks its API."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from fedllm.adapters.folder import WEIGHTS, save_adapter
from fedllm.adapters.layout import initial_adapter
from fedllm.errors import ConfigError, FedLLMError, IntegrityError
from fedllm.files import write_manifest
from scripts.commands.push_command import publishable, push
from tests.builders import small_layout


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    """A hub that takes weights as large files and the rest within the commit; `taken` is what it was sent."""

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            server: Any = self.server
            if self.headers.get("Authorization") != "Bearer hf_test":
                self.answer({"error": "who are you?"}, 401)
            elif self.path == "/api/repos/create":
                server.created = json.loads(body)
                self.answer({"url": f"{self.root}/anna/{json.loads(body)['name']}"})
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
                files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
                self.answer({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                for each in objects:
                    each["actions"] = {"upload": {"href": f"{self.root}/put/{each['oid']}"}}
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        server.taken[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        server.taken[line["value"]["path"]] = server.put[line["value"]["oid"]]
                self.answer({"commitUrl": f"{self.root}/anna/letters/commit/1", "commitOid": "1"})
            else:
                self.answer({})  # the card is valid

        def do_PUT(self) -> None:
            server: Any = self.server
            content = self.rfile.read(int(self.headers["Content-Length"]))
            server.put[self.path.rpartition("/")[2]] = content
            self.answer({})

        def answer(self, values: object, code: int = 200) -> None:
            content = json.dumps(values).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        @property
        def root(self) -> str:
            return f"http://127.0.0.1:{self.server.server_address[1]}"

        def log_message(self, *unused: object) -> None:
            pass

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.taken, server.put, server.created = {}, {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder: an adapter, and next to it what no push may touch."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "anna.safetensors").write_text("mine")
    (tmp_path / "partition.json").write_text("{}")
    save(tmp_path / "adapter")
    return tmp_path


def save(folder: Path, **options: bool) -> None:
    names = {"base_model": "org/base", "revision": "", "target_modules": ["a", "c"], "card": "# A card\n"}
    save_adapter(folder, initial_adapter(small_layout(), 0), **names, **options)  # type: ignore[arg-type]


def command(server: ThreadingHTTPServer, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own: the hub's address is read when its library is loaded."""
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": "hf_test", "HF_HUB_DISABLE_TELEMETRY": "1"}
    line = [sys.executable, "-m", "fedllm", "push", *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_adapter_and_nothing_else_reaches_the_hub(hub: Any, run: Path) -> None:
    done = command(hub, run, "letters", "--private", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    files = {file.name: file.read_bytes() for file in (run / "adapter").iterdir()}
    assert hub.taken == files
    assert WEIGHTS in files
    assert hub.created["name"] == "letters"
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    report = json.loads(done.stdout)
    assert report["files"] == sorted(files)
    assert report["bytes"] == sum(map(len, files.values()))
    assert all(name in done.stderr for name in files)  # shown before


def test_a_hub_that_refuses_or_is_away_is_one_line(
    hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.commands.push_command.get_token", lambda: "hf_wrong")
    with pytest.raises(FedLLMError, match=r"OfflineModeIsEnabled"):
        push(run, "letters", private=False, yes=True, as_json=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for port, told in ((hub.server_address[1], "401"), (9, "ConnectError")):
        own = partial(HfApi, endpoint=f"http://127.0.0.1:{port}")
        monkeypatch.setattr("scripts.commands.push_command.HfApi", own)
        with pytest.raises(FedLLMError, match=rf"the hub did not take it: .*{told}") as refused:
            push(run, "letters", private=False, yes=True, as_json=False)
        assert "\n" not in str(refused.value)
    assert hub.taken == {}


def test_without_token_or_consent_nothing_is_sent(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.commands.push_command.get_token", lambda: None)
    with pytest.raises(ConfigError, match="hf auth login"):
        push(run, "letters", private=False, yes=True, as_json=False)
    monkeypatch.setattr("scripts.commands.push_command.get_token", lambda: "hf_test")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(ConfigError, match="--yes"):
        push(run, "letters", private=False, yes=False, as_json=False)
    told = capsys.readouterr().out
    assert f"{(run / 'adapter' / WEIGHTS).stat().st_size:,}  {WEIGHTS}" in told
    assert "for everybody to read" in told


def test_a_folder_with_anything_else_is_refused(run: Path) -> None:
    (run / "adapter" / "rows.jsonl").write_text("private text")
    with pytest.raises(IntegrityError, match="not listed"):
        publishable(run)
    write_manifest(run / "adapter")  # whoever listed it: it is none of an adapter's files
    with pytest.raises(ConfigError, match=r"rows\.jsonl.*nothing is sent"):
        publishable(run / "adapter")
    with pytest.raises(ConfigError, match="neither a run"):
        publishable(run / "private")
    (run / "adapter" / "model-anna").mkdir()
    (run / "adapter" / "rows.jsonl").rename(run / "adapter" / "model-anna" / "a.safetensors")
    write_manifest(run / "adapter")
    with pytest.raises(ConfigError, match=r"model-anna/a\.safetensors.*nothing is sent"):
        publishable(run)


def test_a_private_adapter_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "mine", is_public=False)
    with pytest.raises(ConfigError, match="is private"):
        publishable(tmp_path / "mine")
    (tmp_path / "mine").chmod(0o755)
    with pytest.raises(ConfigError, match="is private"):
        publishable(tmp_path / "mine")
