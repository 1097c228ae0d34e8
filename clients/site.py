"""What this machine's owner allows: paths, privacy, rank and where private state lies."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from fedllm.config.key import Scalar
from fedllm.config.run_config import RunConfig
from fedllm.data.find_files import find_files
from fedllm.data.rows import is_local
from fedllm.errors import ConfigError, DataError, ModelError, PolicyError
from fedllm.models.files import ModelFiles, content_digest, is_local_model
from fedllm.plan.privacy import PrivacyPlan
from fedllm.privacy.data_budget import DataBudget, accounts_of, budget_folder
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


def data_path_of(node: NodeConfig) -> Path | None:
    """Return where the rows are that this node was started with, by the one name that links lead to."""
    return Path(str(node["data-path"])).expanduser().resolve() if "data-path" in node else None


def data_budget(data_path: Path | None, state_path: Path) -> DataBudget | None:
    """Return the ledger of a node's rows and the owner's limit; rows dealt from a source have none.

    It lies in the state folder of the machine, which nodes share, and without a site.toml in the node's.
    """
    if data_path is None:
        return None
    policy = load_policy()
    folder = budget_folder(policy.state_folder if policy.file else state_path, data_path)
    limit = policy.budget
    return DataBudget(folder=folder, epsilon=limit.epsilon, delta=limit.delta, unit=limit.unit)


def check_paths(config: RunConfig, node: NodeConfig) -> None:
    """Refuse rows outside the data root, and paths that came from a server where they are not allowed."""
    policy, own = load_policy(), data_path_of(node)
    if own is not None:
        policy.check_below_root(own, "data-path in the node config")
    source = config.data.source
    opens_named = own is None and source != "docstrings" and is_local(source)
    if node.get("server-paths") is True or policy.allow.server_paths:  # the text "false" permits nothing
        for file in find_files(source, config.data.split) if opens_named and policy.site.data_root else ():
            policy.check_below_root(Path(file), "data.source")
        return
    if opens_named:
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


def check_privacy(plan: PrivacyPlan | None, node: NodeConfig) -> None:
    """Refuse a run whose answers no noise of this machine's protects, where its owner has set a budget.

    Raises:
        PolicyError: it leaves the noise to a server, or to other sites where this one does not choose its
            peers; it hides less than the owner's unit, wants more than the whole budget, or lets a number
            leave that nothing noises; or the node has no rows of its own.
    """
    policy = load_policy()
    budget = policy.budget
    if not budget.epsilon:
        return
    # Shares of noise protect together with those of the peers, whom an owner names where it requires masks.
    trusts = ("local", "distributed") if policy.allow.secure_aggregation == "required" else ("local",)
    wanted = (
        f"this machine's [budget] wants noise of its own clients for unit {budget.unit!r}, within epsilon"
    )
    if plan is None or plan.trust not in trusts or plan.epsilon > budget.epsilon or plan.delta > budget.delta:
        has = "none" if plan is None else f"{plan.epsilon:g} at delta {plan.delta:g} with trust {plan.trust}"
        raise PolicyError(f"{wanted} {budget.epsilon:g} at delta {budget.delta:g}; the run has {has}")
    if budget.unit not in accounts_of(plan.unit):
        raise PolicyError(f"{wanted} {budget.epsilon:g}; the run's privacy.unit is {plan.unit!r}")
    if plan.metrics != "withheld":
        raise PolicyError(
            f"under this machine's [budget] no exact number leaves, as does under privacy.metrics ="
            f" {plan.metrics!r}; the run must set privacy.metrics = 'withheld'"
        )
    if "data-path" not in node:
        raise PolicyError(
            "this machine's [budget] is that of a data set, and this node has rows dealt from data.source;"
            " name its own: data in its table of site.toml, or data-path"
        )
