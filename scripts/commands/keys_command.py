"""`fedllm keys`: the key of a site, and of whoever signs adapters."""

from pathlib import Path

from fedllm.identity import load_key, new_key, public_text


def new(path: Path) -> None:
    """Make a key, and print what names it: at the site, at the server, and where adapters are loaded."""
    path = path.expanduser().absolute()
    public = public_text(new_key(path))
    print(f"{path} is the new key: it never leaves this machine.")
    print(f'\nIn site.toml, under [site]:\n    key = "{path}"')
    print(
        f'\nIn the server\'s list of sites (federation.sites):\n    [sites.NAME]\n    public-key = "{public}"'
    )
    print(f'\nIn site.toml, where what it signs is loaded:\n    [adapters]\n    signers = ["{public}"]')


def show(path: Path) -> None:
    """Print the public half of a key."""
    print(public_text(load_key(path.expanduser())))
