"""`fedllm site forget`: rows that this machine's owner has taken back, which no run reads here any more."""

from pathlib import Path

from clients.forgotten import FORGOTTEN, forget_rows
from fedllm.config.keys import DataConfig
from fedllm.data.shards import load_one_client
from fedllm.errors import ConfigError
from fedllm.site_policy import load_policy
from scripts.runtimes.site import account_of


def forget(rows: Path, *, columns: str, file: Path | None) -> None:
    """Add the rows of a file to those that this machine forgets, read as runs with these `data.columns` do.

    Raises:
        ConfigError: there is no site.toml, or the columns do not fit the rows.
        DataError: the rows cannot be read.
        CheckpointError: what is forgotten cannot be kept.
    """
    policy = load_policy(file)
    if policy.file is None:
        raise ConfigError("no site.toml: name it with --config, or in $FEDLLM_SITE (docs/site.md)")
    data = DataConfig(columns=columns, held_out_fraction=0.0)
    examples = load_one_client(rows, data, client_id="rows", seed=0).client.train
    number = forget_rows(policy.state_folder, examples)
    account_of(policy.site.user).owns(policy.state_folder, policy.state_folder / FORGOTTEN)
    print(f"{number} rows are forgotten here ({policy.state_folder / FORGOTTEN})")
    print("a run done before forgets them once its server calls fedllm unlearn ... --rows-gone")
