"""`fedllm keys`: the key of a site, and of whoever signs adapters."""

from pathlib import Path

from fedllm.identity import load_key, new_key, public_text


def new(path: Path) -> None:
    """Make a site's key, and print what names it at the site and at the server."""
    path = path.expanduser().absolute()
    public = public_text(new_key(path))
    print(f"{path} is this site's key: it never leaves this machine.")
    print(f'\nIn site.toml, under [site]:\n    key = "{path}"')
    print(
        f'\nIn the server\'s list of sites (federation.sites):\n    [sites.NAME]\n    public-key = "{public}"'
    )


def show(path: Path) -> None:
    """Print the public half of a key."""
    print(public_text(load_key(path.expanduser())))
