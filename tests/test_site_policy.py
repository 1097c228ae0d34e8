"""site.toml: what stands there is taken as it is meant, or refused in one line."""

from pathlib import Path

import pytest

from fedllm.errors import ConfigError, PolicyError
from fedllm.identity import new_key, public_text
from fedllm.site_policy import Allowed, Budget, Limits, Machine, SitePolicy, load_policy

NODE = "[nodes.ward]\n"


@pytest.fixture
def site_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    return tmp_path / "site.toml"


def test_without_a_file_nothing_is_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLLM_SITE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_policy() == SitePolicy()
    assert not load_policy().allow.server_paths
    assert not load_policy().allow.trust_remote_code


@pytest.mark.parametrize("is_set", [True, False])
def test_the_policy_of_an_earlier_release_is_refused(
    is_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It limited this machine; to go on without those limits would be the wrong guess."""
    monkeypatch.setenv("HOME", str(tmp_path))
    if is_set:
        monkeypatch.setenv("FEDLLM_POLICY", "policy.toml")
    else:
        old = tmp_path / ".config" / "fedllm" / "policy.toml"
        old.parent.mkdir(parents=True)
        old.touch()
    with pytest.raises(ConfigError, match=r"is not read any more: move its keys to site\.toml"):
        load_policy()


def test_a_file_that_is_named_and_cannot_be_read_is_an_error(site_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.toml, where this site's policy should be, does not exist"):
        load_policy()
    site_file.mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", SitePolicy()),
        ("[allow]\nserver-paths = true", SitePolicy(allow=Allowed(server_paths=True))),
        ('[site]\nstate-path = "/private"', SitePolicy(site=Machine(state_path="/private"))),
        ("[budget]\nepsilon = 8", SitePolicy(budget=Budget(epsilon=8.0))),
        ('[allow]\ntrust-remote-code = ["a", "b"]', SitePolicy(allow=Allowed(trust_remote_code=("a", "b")))),
        ("[limits]\nsteps = 9\nseconds = 1.5", SitePolicy(limits=Limits(steps=9, seconds=1.5))),
    ],
)
def test_a_file_permits_what_it_names(text: str, expected: SitePolicy, site_file: Path) -> None:
    site_file.write_text(text)
    found = load_policy()
    assert (found.site, found.allow, found.limits, found.budget) == (
        expected.site,
        expected.allow,
        expected.limits,
        expected.budget,
    )
    assert found.file == site_file


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[allow]\nserver-paths = yes", "not a TOML file"),
        ("server-paths = true", r"unknown table \[server-paths\]; did you mean '\[allow\] server-paths'"),
        ("[alow]", r"unknown table \[alow\]; did you mean 'allow'"),
        ("allow = 1", "allow must be a table"),
        ("[nodes]\nward = 1", "nodes.ward must be a table"),
        ("[allow]\nserver_paths = true", "unknown key 'server_paths'; did you mean 'server-paths'"),
        ("[limits]\nstep = 1", "unknown key 'step'; did you mean 'steps'"),
        ('[allow]\nserver-paths = "true"', "server-paths must be true or false"),
        ("[allow]\nserver-paths = 1", "server-paths must be true or false"),
        ("[budget]\nepsilon = -1", "epsilon must be a number"),
        ("[budget]\nepsilon = true", "epsilon must be a number"),
        ("[budget]\nepsilon = nan", "epsilon must be a number"),
        ('[budget]\nepsilon = "8"', "epsilon must be a number"),
        ("[budget]\ndelta = 0", "delta must be above 0"),
        ("[limits]\nevaluations = 1\nperiod-days = 0", "period-days must be above 0"),
        ('[budget]\nunit = "row"', "unit must be text, of example, client"),
        ('[allow]\nsecure-aggregation = "on"', "must be text, of off, required"),
        ("peers = 1", "peers must be a table"),
        ('[peers]\nnorth = "ed25519:AAAA"', "peers.north must be a site's public key"),
        ("[peers]\nnorth = 1", "peers.north must be a site's public key"),
        ('[allow]\nsecure-aggregation = "required"', "needs allow.bundles; without it a server's own code"),
        ('[allow]\nsecure-aggregation = "required"\nbundles = ["ab"]', "needs peers; without it a server"),
        ('[allow]\nmessages = ["joins"]', "messages must be a list of texts, of join, train"),
        ("[limits]\nsteps = 1.5", "steps must be a whole number"),
        ("[site]\nstate-path = 1", "state-path must be text"),
        ('[allow]\ntrust-remote-code = "org/a"', "trust-remote-code must be a list"),
        ("[allow]\ntrust-remote-code = [1]", "trust-remote-code must be a list"),
        ('[allow]\nservers = ["a:1"]\n[nodes.ward]\nsuperlink = "b:1"', "ward.superlink is none of"),
    ],
)
def test_file_not_understood_permits_nothing(text: str, expected: str, site_file: Path) -> None:
    site_file.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_policy()
    assert "\n" not in str(caught.value)


def test_secret_sums_are_required_with_all_that_they_rest_on(site_file: Path, tmp_path: Path) -> None:
    public = public_text(new_key(tmp_path / "key"))
    allow = '[allow]\nsecure-aggregation = "required"\nbundles = ["ab"]\nmin-parties = 4\n'
    text = f'{allow}[peers]\nnorth = "{public}"\n'
    for table in (text, text.removeprefix(allow)):
        site_file.write_text(table)
        with pytest.raises(ConfigError, match=r"needs site\.key; without it the other sites"):
            load_policy()
    site_file.write_text(f'{text}[site]\nkey = "key"')
    found = load_policy()
    assert found.peers == {"north": public}
    assert found.allow.min_parties == 4


def test_a_byte_order_mark_is_no_part_of_a_policy(site_file: Path) -> None:
    site_file.write_bytes(b"\xef\xbb\xbf[allow]\r\nserver-paths = true\r\n")
    assert load_policy().allow.server_paths


def test_bytes_that_are_no_text_are_an_error(site_file: Path) -> None:
    site_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load_policy()


def test_a_node_is_started_with_what_its_table_says(site_file: Path) -> None:
    site_file.write_text(f'{NODE}data = "rows.jsonl"\nmax-rank = 4\nheld-out-rows = 9')
    found = load_policy().node_config("ward")
    assert found["data-path"] == str(site_file.parent / "rows.jsonl")
    assert (found["client-id"], found["max-rank"], found["held-out-rows"]) == ("ward", 4, 9)
    assert "model-path" not in found
    with pytest.raises(PolicyError, match=r"there is no \[nodes.other\]"):
        load_policy().node_config("other")


@pytest.mark.parametrize("data", ["../secret.jsonl", "/etc/passwd", "~/rows", "a/../../b", "link", "folder"])
def test_data_lies_below_the_data_root(data: str, site_file: Path, tmp_path: Path) -> None:
    (tmp_path / "root" / "folder").mkdir(parents=True)
    (tmp_path / "secret.jsonl").touch()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "root" / "folder" / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (tmp_path / "root" / "own.jsonl").touch()
    site_file.write_text(f'[site]\ndata-root = "root"\n{NODE}data = "own.jsonl"\n[nodes.b]\ndata = "{data}"')
    assert load_policy().node_config("ward")["data-path"] == str(tmp_path / "root" / "own.jsonl")
    with pytest.raises(PolicyError, match="data-root") as caught:
        load_policy().node_config("b")
    assert "\n" not in str(caught.value)
