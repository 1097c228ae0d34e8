"""No row leaves its machine, whatever happens there: canaries sought in all that a deployment leaves behind.

The wire passes through a proxy that ends TLS, so that messages themselves are searched, in both directions.
"""

import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from fedllm.chained_log import read_entries, verify
from fedllm.models.base import load_tokenizer
from fedllm.models.files import resolve_model
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import Link, flwr, superexec, superlink, supernode, temporary_link
from scripts.runtimes.submitting import submit
from tests.leak_search import Canaries, contents_of
from tests.proxy import Proxy, proxy

INJECTED = Path(__file__).with_name("injected")
CODES = {
    "panic": "bad-data",
    "crash": "internal",
    "memory": "out-of-memory",
    "row": "ok",
    "debug": "ok",
    "normal": "ok",
}
SAID = {  # what a node's own log says, so that no fault fails to happen unnoticed
    "panic": "the tokenizer broke down (PanicException)",
    "crash": "internal: unforeseen ValueError",
    "memory": "out-of-memory: ",
    "row": "1 bad row",
    "debug": "DEBUG",
}
NUM_CANARIES = 50
LEAKY = {
    "pyproject.toml": """
[project]
name = "leaky"
version = "1.0.0"
dependencies = []
license = "Apache-2.0"
[tool.flwr.app]
publisher = "tests"
[tool.flwr.app.components]
serverapp = "leaky.app:server"
clientapp = "leaky.app:client"
[tool.flwr.app.config]
""",
    "leaky/__init__.py": "",
    "leaky/app.py": """
from pathlib import Path
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
client, server = ClientApp(), ServerApp()


@client.train()
def train(message, context):
    raise ValueError(f"cannot parse {Path(context.node_config['data-path']).read_text()}")


@server.main()
def main(grid, context):
    nodes = grid.get_node_ids()
    grid.send_and_receive([Message(RecordDict(), node, "train", group_id="1") for node in nodes])
""",
}


@pytest.fixture(scope="module")
def canaries(make_model_folder: Callable) -> Canaries:
    tokenizer = load_tokenizer(resolve_model(str(make_model_folder())))
    texts = tuple(secrets.token_hex(8) for _ in range(NUM_CANARIES))
    tokens = [tuple(tokenizer(f"canary {text} of", add_special_tokens=False)["input_ids"]) for text in texts]
    return Canaries(texts, tuple(ids[-12:-4] for ids in tokens))


class Federation:
    """A hardened deployment whose every connection passes through a recording proxy."""

    def __init__(self, folder: Path, link: Link, between: Proxy):
        self.folder, self.link, self.between = folder, link, between

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        ends = time.monotonic() + 300
        while not is_there():
            assert time.monotonic() < ends, self.link.log.read_text()
            time.sleep(0.3)

    def leaks(self, canaries: Canaries) -> dict[str, list[str]]:
        """Return where a canary is: on the wire, or in a file or database; rows' own files are elsewhere."""
        sought = [("wire", bytes(stream)) for stream in self.between.streams]
        for folder in (self.link.folder, self.folder / "runs", self.folder / "state"):
            sought += [(str(file), content) for file, content in contents_of(folder)]
        seen = {content: place for place, content in sought}  # most files are there more than once
        found = {place: canaries.found_in(content) for content, place in seen.items()}
        return {place: forms for place, forms in found.items() if forms}


@contextmanager
def federation(
    folder: Path, model: Path, canaries: Canaries, faults: tuple[str, ...]
) -> Iterator[Federation]:
    """Run a SuperLink, and a data holder for each fault, over which the canaries are dealt."""
    with ExitStack() as stack:
        link = stack.enter_context(temporary_link(is_hardened=True))
        assert link.credentials
        log_level = {"FLWR_LOG_LEVEL": "DEBUG"} if "debug" in faults else {}
        stack.enter_context(superlink(link, variables=log_level))
        accept = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        accept.load_cert_chain(link.credentials.certificate, link.credentials.key)
        connect = ssl.create_default_context(cafile=link.credentials.authority)
        between = stack.enter_context(proxy(link.port, accept=accept, connect=connect))
        link = replace(link, port=between.port)
        stack.enter_context(superexec(link, log_level))
        for number, fault in enumerate(faults):
            rows = [
                json.dumps(
                    {"prompt": f"What is canary {text} of?", "response": f"Return canary {text} of it."}
                )
                for text in canaries.texts[number :: len(faults)]
            ]
            if fault == "row":
                rows[-1] = rows[-1][:-9]  # no JSON: it has no end
            file = folder / f"holder-{fault}.jsonl"
            file.write_text("\n".join(rows) + "\n")
            site = folder / f"{fault}.toml"
            site.write_text(tomli_w.dumps({"site": {"state-path": str(folder / "state" / fault)}}))
            path = f"{INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            own = {"FEDLLM_TEST_FAULT": fault, "FEDLLM_TEST_ROWS": str(file), "FEDLLM_SITE": str(site)}
            node = {"data-path": str(file), "model-path": str(model), "client-id": f"holder-{fault}"}
            stack.enter_context(supernode(link, fault, node, {"PYTHONPATH": path, **own, **log_level}))
        yield Federation(folder, link, between)


def check_no_leak(
    running: Federation, canaries: Canaries, tiny_run: list[str], faults: tuple[str, ...]
) -> None:
    """Do a run of one round in which nodes fail as they do; then no canary is anywhere."""
    config = config_of(
        tiny_run,
        [
            *(f"federation.num-clients={len(faults)}", "federation.min-clients=1"),
            *("federation.num-rounds=1", "federation.max-retries=0"),
            *("data.source=docstrings", f"run.output={running.folder / 'runs'}", "run.name=sought"),
        ],
    )
    submit(running.link, config, {})
    run = running.folder / "runs" / "sought"
    running.wait_for((run / "result.json").exists)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed", result
    assert running.leaks(canaries) == {}
    verify(run / "decisions.jsonl")
    answered = {
        entry["answer"] for entry in read_entries(run / "decisions.jsonl") if entry["event"] == "reply"
    }
    for fault in faults:
        log = running.folder / "state" / fault / "log.jsonl"
        verify(log)
        entries = list(read_entries(log))
        assert entries[-1]["code"] == CODES[fault], entries
        assert {entry["answer"] for entry in entries if entry["code"] == "ok"} <= answered
        printed = "".join(file.read_text() for file in running.link.folder.glob(f"{fault}*.log"))
        assert SAID.get(fault, "") in printed


def check_search_finds_flowers_own_leak(running: Federation, canaries: Canaries) -> None:
    """A stock app whose client raises with its rows: Flower sends the words of an exception to the server."""
    app = running.folder / "app"
    for name, text in LEAKY.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    assert flwr(running.link, ["run", str(app), "here", "--format", "json"]).get("run-id")
    running.wait_for(lambda: any(canaries.texts[0].encode() in stream for stream in running.between.streams))
    running.wait_for(lambda: len(running.leaks(canaries)) > 1)
    found = running.leaks(canaries)
    assert "utf-8" in found["wire"]
    assert any("superlink.db" in place for place in found)


@pytest.mark.slow
def test_no_row_leaves_and_flowers_own_leak_is_found(
    canaries: Canaries, tiny_run: list[str], make_model_folder: Callable, tmp_path: Path
) -> None:
    faults = ("debug", "panic")
    with federation(tmp_path, make_model_folder(), canaries, faults) as running:
        check_no_leak(running, canaries, tiny_run, faults)
        check_search_finds_flowers_own_leak(running, canaries)


@pytest.mark.soak
def test_no_row_leaves_in_six_scenarios(
    canaries: Canaries, tiny_run: list[str], make_model_folder: Callable, tmp_path: Path
) -> None:
    faults = tuple(CODES)
    with federation(tmp_path, make_model_folder(), canaries, faults) as running:
        check_no_leak(running, canaries, tiny_run, faults)
        check_search_finds_flowers_own_leak(running, canaries)
