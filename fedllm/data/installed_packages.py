"""Finds the Python packages that fedllm's users have installed anyway, and their source files.

These are the distributions that fedllm depends on, directly or not, and the parts of the standard library.
Nothing is imported.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

# What pyproject.toml requires. Flower runs fedllm from a bundle, where no metadata says so.
REQUIREMENTS = (
    *("flwr[simulation]", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "gguf"),
    *("typer", "rich", "tomli-w", "numpy", "pyarrow", "cryptography", "datasketch", "platformdirs", "scipy"),
    *(
        "click",
        "huggingface-hub",
        "jinja2",
        "markupsafe",
        "packaging",
        "pyyaml",
        "httpx",
        "starlette",
        "uvicorn",
    ),
)
_REQUIREMENT = re.compile(
    r"\s*(?P<name>[\w.-]+)\s*(\[(?P<extras>[^]]*)\])?[^;]*(;(?P<marker>.*))?", re.DOTALL
)
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w.-]+)["']""")

# Folders that neither a distribution's name nor its list of top-level modules gives away
_FOLDERS = {
    "python-dateutil": "dateutil",
    "protobuf": "google/protobuf",
    "markdown-it-py": "markdown_it",
    "pyyaml": "yaml",
    "pycryptodome": "Crypto",
}
_TEST_FOLDERS = frozenset({"tests", "test", "testing", "_testing"})
_FOREIGN_FOLDERS = frozenset(  # other people's code, and what is not Python
    {
        *("_vendor", "vendor", "vendored", "_vendored", "third_party", "thirdparty", "thirdparty_files"),
        *("externals", "_external", "extern", "include", "lib", "bin", "share", "__pycache__"),
    }
)
_SKIPPED_FILE = re.compile(r"test_.*|.*_test|.*_tests|conftest|.*_pb2|.*_pb2_grpc")
_SKIPPED_STANDARD = frozenset(  # tests, copies of distributions, tables
    {"idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "distutils"}
    | {"site-packages", "dist-packages"}
    | _TEST_FOLDERS
)
_MODULES = "python"  # the client that holds the standard library's single-file modules


_NOT_IN_A_NAME = re.compile(r"\b(the|licen[cs]e|version)\b|[,()]")
_LICENCES = {  # what people write where SPDX is meant; a bare "BSD" may be either
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache software": "Apache-2.0",
    "3-clause bsd": "BSD-3-Clause",
    "isc iscl": "ISC",
}
_OF_PYTHON = "Python-2.0"  # the standard library's


@dataclass(frozen=True)
class Package:
    """One top-level package; `nested` is false where only the folder's own files belong to it.

    `distribution` is what it was installed as, "" for a part of the standard library.
    """

    name: str
    folder: Path
    nested: bool = True
    distribution: str = ""


def licence_of(package: Package) -> str:
    """Return a package's licence as an SPDX expression, "" where its metadata says none, or several."""
    if not package.distribution:
        return _OF_PYTHON
    about = metadata.metadata(package.distribution)
    said = [text for text in about.get_all("License") or () if text != "UNKNOWN"]
    classifiers = [line for line in about.get_all("Classifier") or () if line.startswith("License ::")]
    named = about.get_all("License-Expression") or said or [line.split(" :: ")[-1] for line in classifiers]
    found = set(map(_spdx, named))
    return found.pop() if len(found) == 1 else ""


def _spdx(text: str) -> str:
    """Return the SPDX expression that is meant by a text, "" where it is not plain which."""
    name = " ".join(_NOT_IN_A_NAME.sub(" ", text.lower()).split())
    for spelling in (text, _LICENCES.get(name, name)):
        with suppress(InvalidLicenseExpression):
            return str(canonicalize_license_expression(spelling))
    return ""


def installed_packages() -> tuple[Package, ...]:
    """Return fedllm's dependencies and the parts of the standard library, sorted by name."""
    found = {package.name: package for package in (*_standard_packages(), *_dependency_packages())}
    return tuple(found[name] for name in sorted(found))


def source_files(package: Package) -> list[Path]:
    """Return the package's own Python files: no tests, no vendored or generated code.

    They are ordered by a hash of their relative path, so that a prefix of the list is spread evenly over the
    package and one more file in the next version displaces no other.
    """

    def path_hash(file: Path) -> bytes:
        path = file.relative_to(package.folder).as_posix()
        return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()  # a name may be no text

    return sorted((file for file in _walk(package) if not _SKIPPED_FILE.fullmatch(file.stem)), key=path_hash)


def _walk(package: Package) -> Iterator[Path]:
    for folder, folders, names in os.walk(package.folder):
        skipped = _TEST_FOLDERS | _FOREIGN_FOLDERS
        nested = [name for name in folders if name not in skipped and not name.startswith(".")]
        folders[:] = nested if package.nested else []  # os.walk goes on into what is left of this list
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _standard_packages() -> Iterator[Package]:
    root = Path(sysconfig.get_path("stdlib"))
    if root.is_dir():
        yield Package(_MODULES, root, nested=False)
        names = (file.parent.name for file in root.glob("*/__init__.py"))
        yield from (Package(name, root / name) for name in names if name not in _SKIPPED_STANDARD)


def _dependency_packages() -> Iterator[Package]:
    for name, distribution in sorted(_dependencies().items()):
        listed = (distribution.read_text("top_level.txt") or "").split()
        for folder in dict.fromkeys([_FOLDERS.get(name, name.replace("-", "_")), *listed]):
            path = Path(str(distribution.locate_file(folder)))
            if not folder.startswith("_") and (path / "__init__.py").is_file():
                yield Package(folder.replace("/", "."), path, distribution=name)


def _dependencies() -> dict[str, metadata.Distribution]:
    """Return the distributions that fedllm needs, directly or not, and that are installed."""
    try:
        waiting = list(metadata.requires("fedllm") or REQUIREMENTS)
    except metadata.PackageNotFoundError:
        waiting = list(REQUIREMENTS)
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, extras, marker = _parse_requirement(waiting.pop())
        if (name, extras) in done or _EXTRA.search(marker):
            continue
        done.add((name, extras))
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        waiting.extend(_open_requirement(line, extras) for line in found[name].requires or [])
    return found


def _parse_requirement(line: str) -> tuple[str, frozenset[str], str]:
    """Return the normalised name, the extras asked for and the marker of a requirement line."""
    match = _REQUIREMENT.match(line)
    assert match is not None  # installed metadata is well-formed
    extras = frozenset(extra.strip() for extra in (match["extras"] or "").split(",") if extra.strip())
    return re.sub(r"[-_.]+", "-", match["name"]).lower(), extras, match["marker"] or ""


def _open_requirement(line: str, extras: frozenset[str]) -> str:
    """Return `line` without its marker where one of `extras` asks for it."""
    wanted = _EXTRA.search(line)
    return line.partition(";")[0] if wanted and wanted[1] in extras else line
