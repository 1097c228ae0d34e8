"""What a site's SuperNode does otherwise than Flower's, on Flower's own stores."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from clients.flower_programs import fetch_message

RUN, NODE = 7, 3
fetch = import_module("flwr.supernode.start_client_internal")._pull_and_store_message


def end_run(*arguments: Any) -> Any:
    raise RunNotRunningException


def question() -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, 1, 1
    message = Message(RecordDict({"c": ConfigRecord({"round": 1})}), dst_node_id=NODE, message_type="train")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


@pytest.mark.parametrize("step", ["pull_object", "confirm_message_received"])
@pytest.mark.parametrize("fetching", [fetch_message, None], ids=["ours", "flower"])
def test_fetch_drops_a_message_whose_run_ends(step: str, fetching: Callable | None) -> None:
    store, message = InMemoryObjectStore(), question()
    state = InMemoryNodeState(store)
    state.set_node_id(NODE)
    run = Run.create_empty(RUN)
    state.store_run(run)
    parts = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
    given = {
        "state": state,
        "object_store": store,
        "node_config": {},
        "receive": lambda: (message, get_object_tree(message)),
        "get_run": lambda run_id: run,
        "get_fab": end_run,
        "pull_object": lambda run_id, object_id: parts[object_id],
        "confirm_message_received": lambda run_id, message_id: None,
        "trusted_entities": None,
    } | {step: end_run}
    found = fetching(fetch, **given) if fetching else fetch(**given)
    assert found is None
    kept = state.get_messages_legacy(is_reply=False)
    assert len(kept) == (fetching is None)  # Flower keeps it; when it no longer does, `fetch_message` can go
