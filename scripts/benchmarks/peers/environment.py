"""Environments of their own for peers that cannot be installed next to fedllm.

pfl-research 0.6 wants dp-accounting below 0.6, fedllm from 0.6 on. Such a peer is installed, with what it
needs in other versions, into a virtual environment in the cache. Everything else (torch, transformers) that
environment finds where the running Python has it, so both sides of a comparison run on the same torch, in
one process.

    $(python -m scripts.benchmarks.peers.environment) -m pytest tests/benchmarks/test_client.py -k pfl
"""

import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from fedllm.errors import MissingExtraError
from fedllm.files import cache_folder

PFL = ("pfl==0.6.0",)


def peer_python(*requirements: str) -> Path:
    """Return the Python of an environment that has `requirements`; it is made when first asked for.

    Raises:
        MissingExtraError: they cannot be installed, for want of a network say.
    """
    packages = sysconfig.get_path("purelib")
    key = hashlib.sha256(repr((requirements, sys.version, packages)).encode()).hexdigest()[:16]
    folder = cache_folder() / "peers" / key
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.is_file():
        return python
    venv.create(folder, clear=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # After its own packages, so that those come first; `addsitedir` also follows an editable install.
    Path(purelib, "running.pth").write_text(f"import site; site.addsitedir({packages!r})\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check")
    done = subprocess.run((*pip, "install", "--quiet", *requirements), capture_output=True, text=True)
    if done.returncode:
        raise MissingExtraError(
            f"{', '.join(requirements)} cannot be installed: {done.stderr.strip()[-200:]}"
        )
    ready.touch()
    return python


if __name__ == "__main__":
    print(peer_python(*PFL), end=os.linesep)
