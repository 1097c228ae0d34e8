"""No row leaves its machine, whatever happens there: canaries sought in all that a deployment leaves behind.

The wire passes through a proxy that ends TLS, so that messages themselves are searched, in both directions.
"""

import json
import os
import secrets
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest

from fedllm.chained_log import read_entries, verify
from fedllm.models.base import load_tokenizer
from fedllm.models.files import resolve_model
from fedllm.site_policy import load_policy
from scripts.deploying.certificates import new_node_key
from scripts.recipe_arguments import config_of
from scripts.runtimes.processes import (
    Link,
    flwr,
    free_port,
    process,
    register,
    superexec,
    superlink,
    temporary_link,
)
from scripts.runtimes.site import running_site
from scripts.runtimes.submitting import submit
from tests.leak_search import Canaries, contents_of
from tests.proxy import Proxy, proxy
from tests.site_builder import write_site

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
client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    raise ValueError(f"cannot parse {Path(context.node_config['data-path']).read_text()}")


@server.main()
def main(grid, context):
    nodes = grid.get_node_ids()
    grid.send_and_receive([Message(RecordDict(), node, "train", group_id="1") for node in nodes])
""",
}


def new_canaries(model: Path) -> Canaries:
    tokenizer = load_tokenizer(resolve_model(str(model)))
    texts = tuple(secrets.token_hex(8) for _ in range(NUM_CANARIES))
    tokens = [tuple(tokenizer(f"canary {text} of", add_special_tokens=False)["input_ids"]) for text in texts]
    return Canaries(texts, tuple(ids[-12:-4] for ids in tokens))


@dataclass(frozen=True)
class Federation:
    """A hardened deployment of sites, whose every connection passes through a recording proxy."""

    folder: Path
    link: Link
    between: Proxy
    model: Path

    def wait_for(self, is_there: Callable[[], bool]) -> None:
        ends = time.monotonic() + 400
        while not is_there():
            assert time.monotonic() < ends, self.link.log.read_text()
            time.sleep(0.3)

    def leaks(self, canaries: Canaries) -> dict[str, list[str]]:
        """Return where a canary is: on the wire, or in a file or database; rows' own files are elsewhere."""
        sought = [(f"wire {n}", bytes(stream)) for n, stream in enumerate(self.between.streams)]
        for folder in (self.link.folder, self.folder / "runs", *self.folder.glob("*/state")):
            sought += [(str(file), content) for file, content in contents_of(folder)]
        seen: dict[bytes, str] = {}
        for place, content in sought:  # most files are there more than once
            seen.setdefault(content, place)
        found: dict[str, list[str]] = {}
        for content, place in seen.items():  # a database is there as its file and as its values
            if forms := canaries.found_in(content):
                found[place] = forms + found.get(place, [])
        return found


@contextmanager
def federation(folder: Path, model: Path, is_debugged: bool) -> Iterator[Federation]:
    """Run a SuperLink and its SuperExec behind the proxy; there are no sites yet."""
    level = {"FLWR_LOG_LEVEL": "DEBUG"} if is_debugged else {}
    with ExitStack() as stack:
        link = stack.enter_context(temporary_link(is_hardened=True))
        assert link.credentials
        stack.enter_context(superlink(link, variables=level))
        accept = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        accept.load_cert_chain(link.credentials.certificate, link.credentials.key)
        connect = ssl.create_default_context(cafile=link.credentials.authority)
        between = stack.enter_context(proxy(link.port, accept=accept, connect=connect))
        link = replace(link, port=between.port)
        stack.enter_context(superexec(link, level))
        yield Federation(folder, link, between, model)


def rows_of(texts: Sequence[str]) -> list[str]:
    return [
        json.dumps({"prompt": f"What is canary {text} of?", "response": f"Return canary {text} of it."})
        for text in texts
    ]


@contextmanager
def site(running: Federation, fault: str, texts: Sequence[str]) -> Iterator[None]:
    """Run a site whose rows hold these texts, and which fails as `fault` says."""
    folder = running.folder / fault
    rows, file, key = rows_of(texts), folder / "rows.jsonl", folder / "node.key"
    folder.mkdir()
    if fault == "row":
        rows[-1] = rows[-1][:-9]  # no JSON: it has no end
    file.write_text("\n".join(rows) + "\n")
    register(running.link, new_node_key(key))
    assert running.link.credentials
    node = {"data": str(file), "model-path": str(running.model), "client-id": f"holder-{fault}"}
    node |= {"private-key": str(key), "root-certificates": str(running.link.credentials.authority)}
    policy = load_policy(write_site(folder, running.link.address, {fault: node}))
    path = f"{INJECTED}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    own = {"PYTHONPATH": path, "FEDLLM_TEST_FAULT": fault, "FEDLLM_TEST_ROWS": str(file)}
    with ExitStack() as stack:
        with patch.dict(os.environ, own):
            stack.enter_context(running_site(policy))
        yield


def check_no_leak(
    running: Federation, canaries: Canaries, words: Sequence[str], faults: Sequence[str]
) -> None:
    """Do a run of one round in which sites fail as they do; then no canary is anywhere."""
    changes = [f"federation.num-clients={len(faults)}", "federation.min-clients=1", "federation.num-rounds=1"]
    changes += ["federation.max-retries=0", "data.source=docstrings"]
    config = config_of(words, [*changes, f"run.output={running.folder / 'runs'}", "run.name=sought"])
    submit(running.link, config, {})
    run = running.folder / "runs" / "sought"
    running.wait_for((run / "result.json").exists)
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "completed", result
    assert any(b"holder-" in stream for stream in running.between.streams)  # the wire is in the clear
    assert running.leaks(canaries) == {}
    verify(run / "decisions.jsonl")
    answered = {entry.get("answer") for entry in read_entries(run / "decisions.jsonl")}
    for fault in faults:
        state = running.folder / fault / "state"
        verify(state / "log.jsonl")
        entries = list(read_entries(state / "log.jsonl"))
        assert CODES[fault] in {entry["code"] for entry in entries}, entries
        assert {entry["answer"] for entry in entries if entry["code"] == "ok"} <= answered
        assert SAID.get(fault, "") in (state / "logs" / "service.log").read_text()


def check_flowers_own_leak(running: Federation, canaries: Canaries, others: Canaries) -> None:
    """Run a stock app whose client raises with its rows: Flower sends an exception's words to the server.

    Of a node that runs what it is sent the search finds them all over; of sites it still finds nothing.
    """
    app, file = running.folder / "app", running.folder / "bare.jsonl"
    file.write_text("\n".join(rows_of(others.texts)))
    for name, text in LEAKY.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)
    key, link = running.folder / "bare.key", running.link
    register(link, new_node_key(key))
    command = ["flower-supernode", *link.trust, "--superlink", link.address, "--port", str(free_port())]
    command += ["--auth-supernode-private-key", str(key), "--node-config", f'data-path="{file}"']
    with process(command, link.folder, link.environment("bare"), "bare"):
        assert flwr(running.link, ["run", str(app), "here", "--format", "json"]).get("run-id")
        running.wait_for(lambda: any(others.texts[0].encode() in each for each in running.between.streams))
        found = running.leaks(others)
        running.wait_for(lambda: running.link.log.read_text().count("Finished task") > 1)
    assert any("utf-8" in forms for place, forms in found.items() if place.startswith("wire"))
    assert any("superlink.db" in place for place in found)
    assert running.leaks(canaries) == {}


def seek(faults: Sequence[str], folder: Path, model: Path, words: Sequence[str]) -> None:
    """Deal canaries over sites that fail in these ways, do a run, and seek them everywhere."""
    canaries, others = new_canaries(model), new_canaries(model)
    with federation(folder, model, "debug" in faults) as running, ExitStack() as sites:
        for number, fault in enumerate(faults):
            sites.enter_context(site(running, fault, canaries.texts[number :: len(faults)]))
        check_no_leak(running, canaries, words, faults)
        check_flowers_own_leak(running, canaries, others)


@pytest.mark.slow
def test_no_row_leaves_and_flowers_own_leak_is_found(
    tiny_run: list[str], make_model_folder: Callable, tmp_path: Path
) -> None:
    seek(("debug", "panic"), tmp_path, make_model_folder(), tiny_run)


@pytest.mark.soak
def test_no_row_leaves_in_six_scenarios(
    tiny_run: list[str], make_model_folder: Callable, tmp_path: Path
) -> None:
    seek(tuple(CODES), tmp_path, make_model_folder(), tiny_run)
