"""A deployment of one's own is bound by one's own site.toml."""

from pathlib import Path

import tomli_w

from fedllm.site_policy import load_policy
from scripts.runtimes.own_sites import own_policy

ALLOW = {"trust-remote-code": ["org/model"], "servers": ["fed.example.org:8443"], "bundles": ["0" * 64]}


def test_what_the_owner_says_of_any_run_holds(monkeypatch, tmp_path: Path):
    file = tmp_path / "site.toml"
    file.write_text(
        tomli_w.dumps(
            {"allow": ALLOW, "limits": {"steps": 7}, "nodes": {"a": {"superlink": ALLOW["servers"][0]}}}
        )
    )
    monkeypatch.setenv("FEDLLM_SITE", str(file))
    made = tmp_path / "made.toml"
    made.write_text(tomli_w.dumps(own_policy(tmp_path / "private")))
    policy = load_policy(made)
    assert (policy.limits.steps, policy.allow.trust_remote_code) == (7, ("org/model",))
    assert policy.allow.server_paths
    assert (policy.allow.servers, policy.allow.bundles, policy.nodes) == ((), (), {}), "of other servers"
    assert policy.state_folder == tmp_path / "private"


def test_without_a_site_toml_an_own_run_is_free(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("FEDLLM_SITE", "")
    assert own_policy(tmp_path) == {"site": {"state-path": str(tmp_path)}, "allow": {"server-paths": True}}
