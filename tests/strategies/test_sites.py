"""The server's list of sites: what it takes, and what it refuses in one line."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import ConfigError
from fedllm.identity import public_text
from strategies.sites import Site, read_sites

# The same in every process: they stand in the names of tests, which a parallel run compares.
KEYS = [public_text(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in (1, 2)]
NORTH, SOUTH = (
    f'[sites.{name}]\npublic-key = "{key}"\n' for name, key in zip(("north", "south"), KEYS, strict=True)
)


def test_a_list_is_read_by_key(tmp_path: Path) -> None:
    path = tmp_path / "sites.toml"
    path.write_text(NORTH + 'clients = ["anna", "ben"]\nmax-rows = 50\n' + SOUTH + "max-weight = 2.5\n")
    assert read_sites(str(path)) == {
        KEYS[0]: Site(name="north", public_key=KEYS[0], clients=("anna", "ben"), max_rows=50),
        KEYS[1]: Site(name="south", public_key=KEYS[1], max_weight=2.5),
    }
    assert read_sites("") is None


def test_a_site_has_one_client_unless_more_are_admitted() -> None:
    site = Site(name="north", public_key=KEYS[0])
    assert site.most_clients == 1
    assert Site(name="north", public_key=KEYS[0], clients=("a", "b", "c")).most_clients == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected a table \[sites\.NAME\]"),
        ("x = 1\n" + NORTH, r"expected a table \[sites\.NAME\]"),
        ("[sites.north]\n", "north.*expected public-key"),
        ('[sites.north]\npublic-key = "abc"\n', "public-key must be the line"),
        (NORTH + "max-row = 1\n", "unknown key 'max-row'; did you mean 'max-rows'"),
        (NORTH + "clients = []\n", "clients must be a list"),
        (NORTH + 'clients = ["../x"]\n', "clients must be a list"),
        (NORTH + "max-clients = 0\n", "max-clients must be a whole number"),
        (NORTH + "max-rows = true\n", "max-rows must be a whole number"),
        (NORTH + "max-weight = inf\n", "max-weight must be a number"),
        (NORTH + 'clients = ["a"]\nmax-clients = 1\n', "give clients or max-clients"),
        (NORTH + SOUTH.replace(KEYS[1], KEYS[0]), "stands there twice"),
        (NORTH + 'clients = ["a"]\n' + SOUTH + 'clients = ["a"]\n', "client a stands there twice"),
        (NORTH.replace("north", '"\\u001b[2J"'), "named like a client"),
        ("[sites", "not a TOML file"),
    ],
)
def test_a_list_that_says_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sites.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_sites(str(path))
    assert "\n" not in str(caught.value)


def test_an_absent_list_admits_nobody(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"federation\.sites: .*cannot be read"):
        read_sites(str(tmp_path / "sites.toml"))
