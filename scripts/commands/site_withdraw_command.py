"""`fedllm site withdraw`: a site, or one node of it, answers no server any more."""

from pathlib import Path

from clients.gate import LOG
from clients.withdrawn import FILE, withdraw
from fedllm.errors import CheckpointError, ConfigError
from fedllm.files import write_bytes
from fedllm.site_policy import load_policy
from scripts.runtimes.site import account_of


def withdraw_site(file: Path | None, *, node: str, reason: str, out: Path) -> None:
    """Withdraw, and write the signed record to `out`, for the servers that the site took part at.

    Raises:
        ConfigError: there is no site.toml, or no key of the site.
        PolicyError: there is no such node.
        CheckpointError: the site has withdrawn, but `out` cannot be written.
    """
    policy = load_policy(file)
    if policy.file is None:
        raise ConfigError("no site.toml: name it with --config, or in $FEDLLM_SITE (docs/site.md)")
    kept = policy.state_folder / FILE
    record = withdraw(policy, node, reason, policy.state_folder / LOG)
    # Where root ran this, the service's user must be able to read it.
    account_of(policy.site.user).owns(policy.state_folder, kept, policy.state_folder / LOG)
    print(
        f"{f'node {node}' if node else 'this site'} has withdrawn: no question is answered any more ({kept})"
    )
    try:
        write_bytes(out, record)
    except OSError as error:
        raise CheckpointError(
            f"{out}: cannot be written ({error.strerror}); the record is in {kept} too"
        ) from None
    print(f"{out} proves it: give it to every server that has used these rows; who asks again is sent it")
