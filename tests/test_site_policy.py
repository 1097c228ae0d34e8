from pathlib import Path

import pytest

from fedllm.errors import ConfigError
from fedllm.site_policy import SitePolicy, load_policy


@pytest.fixture
def policy_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_POLICY", str(tmp_path / "policy.toml"))
    return tmp_path / "policy.toml"


def test_without_a_file_nothing_is_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_POLICY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_policy() == SitePolicy(trust_remote_code=(), server_paths=False)


def test_a_file_that_is_named_and_cannot_be_read_is_an_error(policy_file: Path) -> None:
    """Its owner wanted limits; none would be the wrong guess."""
    with pytest.raises(ConfigError, match=r"FEDLLM_POLICY names .*policy\.toml, which does not exist"):
        load_policy()
    policy_file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SitePolicy()),
        ("server-paths = true", SitePolicy(server_paths=True)),
        ('state-path = "/private/state"', SitePolicy(state_path="/private/state")),
        ("max-epsilon = 8", SitePolicy(max_epsilon=8.0)),
        ('trust-remote-code = ["org/a", "org/b"]', SitePolicy(trust_remote_code=("org/a", "org/b"))),
    ],
)
def test_a_file_permits_what_it_names(text: str, expected: SitePolicy, policy_file: Path) -> None:
    policy_file.write_text(text)
    assert load_policy() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server-paths = yes", "not a TOML file"),
        ("server-paths", "not a TOML file"),
        ("server_paths = true", "unknown key 'server_paths'"),
        ("[server-paths]\nallow = true", "server-paths must be true or false"),
        ('server-paths = "true"', "server-paths must be true or false"),
        ("server-paths = 1", "server-paths must be true or false"),
        ("max-epsilon = -1", "max-epsilon must be a number"),
        ("max-epsilon = true", "max-epsilon must be a number"),
        ('max-epsilon = "8"', "max-epsilon must be a number"),
        ("state-path = 1", "state-path must be the name of a folder"),
        ("trust-remote-code = true", "trust-remote-code must be a list"),
        ('trust-remote-code = "org/a"', "trust-remote-code must be a list"),
        ("trust-remote-code = [1]", "trust-remote-code must be a list"),
    ],
)
def test_file_not_understood_permits_nothing(text: str, expected: str, policy_file: Path) -> None:
    policy_file.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_policy()
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_policy(policy_file: Path) -> None:
    policy_file.write_bytes(b"\xef\xbb\xbfserver-paths = true\r\n")
    assert load_policy().server_paths


def test_bytes_that_are_no_text_are_an_error(policy_file: Path) -> None:
    policy_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_policy()
