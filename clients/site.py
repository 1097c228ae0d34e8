"""What this machine's owner allows: paths, privacy, rank and where private state lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.rows import is_local
from fedllm.errors import ConfigError, DataError, ModelError, PolicyError
from fedllm.models.files import ModelFiles, content_digest, is_local_model
from fedllm.plan.privacy import PrivacyPlan
from fedllm.site_policy import load_policy

# What the owner of a machine starts its node with: `data-path`, `client-id`, `max-rank`, ...
NodeConfig: TypeAlias = Mapping[str, Scalar]


def max_rank_of(node: NodeConfig) -> int:
    """Return the largest rank this machine has room for, 0 = any."""
    rank = node.get("max-rank", 0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:  # True is an int in Python
        raise ConfigError(f"max-rank = {rank!r} in the node config: expected a whole number, 0 = any rank")
    return rank


def state_path_of(node: NodeConfig) -> Path:
    """Return where this node keeps private state: by its config, its machine's policy, or this user's folder.

    On Linux that folder is `~/.local/state/fedllm` ($XDG_STATE_HOME is heeded).
    """
    named = str(node.get("state-path", ""))
    return Path(named).expanduser() if named else load_policy().state_folder


def check_paths(config: RunConfig, node: NodeConfig) -> None:
    """Refuse local paths that came from a server, unless this machine's owner allows such paths."""
    if (
        node.get("server-paths") is True or load_policy().allow.server_paths
    ):  # the text "false" permits nothing
        return
    source = config.data.source
    if "data-path" not in node and source != "docstrings" and is_local(source):
        raise DataError(
            "data.source is a local path, and this node does not open paths a server names;"
            " start it with data-path in its node config, or set [allow] server-paths = true in its site.toml"
        )
    if "model-path" not in node and is_local_model(config.model.name):
        raise ModelError(
            "model.name is a local path, and this node does not open paths a server names;"
            " start it with model-path in its node config, or set [allow] server-paths = true in its"
            " site.toml"
        )


def check_model(files: ModelFiles) -> None:
    """Refuse a base model that is not one of those whose content this machine's owner permits."""
    allowed = load_policy().allow.models
    digest = f"sha256:{content_digest(files.folder)}" if allowed else ""
    if digest and digest not in allowed:
        raise PolicyError(
            f"[allow] models does not name the base model {files.public_name}: it is {digest!r}; add that"
            " where you trust these files"
        )


def check_privacy(plan: PrivacyPlan | None) -> None:
    """Refuse a run that gives away more than this machine's owner allows, or leaves the noise to a server."""
    budget = load_policy().budget
    limit = budget.epsilon  # the owner's own; 0 = none
    if not limit:
        return
    if plan is None or plan.trust != "local" or plan.epsilon > limit or plan.delta > budget.delta:
        has = "none" if plan is None else f"{plan.epsilon:g} at delta {plan.delta:g} with trust {plan.trust}"
        raise ConfigError(
            f"this machine's policy wants noise of its own clients, up to privacy.epsilon = {limit:g} at"
            f" delta {budget.delta:g}; the run has {has}"
        )
    if plan.metrics not in ("withheld", "held-out" if plan.is_by_example else "withheld"):
        raise ConfigError(
            "this machine's policy wants noise of its own clients, and under privacy.metrics ="
            f" {plan.metrics!r} exact numbers of theirs leave without any; use withheld, or leave it at auto"
        )
