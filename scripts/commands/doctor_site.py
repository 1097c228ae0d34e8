"""`fedllm doctor --site`: what this machine's owner permits, and every field that will leave it."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from clients.withdrawn import read_withdrawn
from fedllm.errors import PolicyError
from fedllm.models.files import content_digest, resolve_model
from fedllm.site_policy import MESSAGES, SitePolicy, load_policy
from fedllm.wire.leaving import fields_that_leave
from scripts.console import Console

_TABLES = ("site", "allow", "limits", "budget", "adapters")


def doctor_site() -> None:
    """Print the policy of this machine, table by table, and what leaves for each kind of question.

    Raises:
        ConfigError: site.toml cannot be read.
        PolicyError: rows of a node are outside the data root, or are not there; or nobody knows what was
            withdrawn.
    """
    policy, console = load_policy(), Console()
    console.line(f"site.toml: {policy.file or 'none; every key has its default and nothing is logged'}")
    for one in read_withdrawn(policy.state_folder):
        console.line(f"{one.who} has withdrawn: nothing leaves but its signed record")
    for line in (*_policy_lines(policy), *_node_lines(policy), *_leaving_lines(policy)):
        console.line(line)


def _policy_lines(policy: SitePolicy) -> Iterator[str]:
    for name in _TABLES:
        table = getattr(policy, name)
        default = type(table)()
        yield f"[{name}]"
        for item in fields(table):
            value = getattr(table, item.name)
            is_default = value == getattr(default, item.name)
            yield f"  {_key(item.name)} = {_shown(value)}{'  (default)' * is_default}"
    if policy.peers:
        yield "[peers]"
        yield from (f"  {name} = {_shown(key)}" for name, key in policy.peers.items())


def _node_lines(policy: SitePolicy) -> Iterator[str]:
    for name, node in policy.nodes.items():
        yield f"[nodes.{name}]"
        for item in fields(node):
            if getattr(node, item.name) != item.default:
                yield f"  {_key(item.name)} = {_shown(getattr(node, item.name))}"
        path = policy.node_config(name).get("data-path")
        if path is not None and not os.path.exists(str(path)):
            raise PolicyError(f"{policy.file}: nodes.{name}.data: {path} does not exist")
        if node.model_path:
            folder = resolve_model(str(policy.path(node.model_path))).folder
            yield f'  its base model, for [allow] models: "sha256:{content_digest(folder)}"'


def _leaving_lines(policy: SitePolicy) -> Iterator[str]:
    yield "What leaves this machine, in answer to"
    leaving = fields_that_leave(in_plain=policy.allow.secure_aggregation == "off")
    asked = policy.allow.messages or MESSAGES
    for kind in MESSAGES:
        yield f"  {kind}: {', '.join(leaving[kind]) if kind in asked else 'nothing, it is not answered'}"
    yield f"  whatever else, or what is refused: {', '.join(leaving['any'])}"
    if not policy.is_exact:
        yield "  sizes and weights as powers of two, losses in tenths or not at all, no counts of overlap"


def _key(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_shown(each)}" for name, each in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
