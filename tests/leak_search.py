"""A search for private text in bytes of any kind: as text or token ids, also inside what is compressed."""

import base64
import re
import shutil
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow

_COMPRESSED = re.compile(rb"\x1f\x8b\x08|\x78[\x01\x5e\x9c\xda]|\x28\xb5\x2f\xfd|PK\x03\x04")
_CHUNK_LINE = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")
_DEEPEST = 3  # a packet in a stream in an archive
_LARGEST = 1 << 26  # bytes of one stream, unpacked
_ZIP_MEMBER = struct.Struct("<26xHH")
_INTEGERS = ("<i2", "<i4", "<i8")


@dataclass(frozen=True)
class Canaries:
    """Texts that occur in private rows and nowhere else, and their token ids inside such a row."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]

    @cached_property
    def forms(self) -> dict[bytes, str]:
        """Every form in which one could be found, with its name."""
        found: dict[bytes, str] = {}
        for text in self.texts:
            for name in ("utf-8", "utf-16-le", "utf-16-be"):
                found[text.encode(name)] = name
            for shift in range(3):  # base64 depends on where the text begins
                found[base64.b64encode(b"x" * shift + text.encode())[4:-4]] = "base64"
        for ids in self.tokens:
            found |= {np.array(ids, kind).tobytes(): f"token ids {kind}" for kind in _INTEGERS}
            found[", ".join(map(str, ids)).encode()] = "token ids in words"
        return found

    def found_in(self, content: bytes) -> list[str]:
        """Return the names of the forms that occur in the content or in anything packed inside it."""
        layers = list(unpacked(content))
        return sorted({name for form, name in self.forms.items() if any(form in layer for layer in layers)})


def unpacked(content: bytes, depth: int = 0) -> Iterator[bytes]:
    """Yield the content, and whatever is found compressed in it, also inside each other."""
    yield content
    if b"ransfer-encoding: chunked" in content[:10_000_000].replace(b"T", b"t"):
        yield _CHUNK_LINE.sub(b"", content)
    if depth == _DEEPEST:
        return
    for place in _COMPRESSED.finditer(content):
        for inner in _unpack(content, place.start(), place.group()):
            if len(inner) > 8:
                yield from unpacked(inner, depth + 1)


def _unpack(content: bytes, start: int, magic: bytes) -> Iterator[bytes]:
    if magic.startswith(b"PK"):  # each member by itself: the archive may stand in the middle of something
        header = content[start : start + _ZIP_MEMBER.size]
        if len(header) == _ZIP_MEMBER.size:
            start += _ZIP_MEMBER.size + sum(_ZIP_MEMBER.unpack(header))  # its name and its extra field
            yield _joined(_inflated(content, start, -zlib.MAX_WBITS))
    elif magic.startswith(b"\x28\xb5"):
        stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(content[start:]), "zstd")
        yield _joined(iter(lambda: stream.read(1), b""))  # what follows the stream is an error
    else:
        yield _joined(_inflated(content, start, zlib.MAX_WBITS | 32))  # zlib or gzip


def _inflated(content: bytes, start: int, form: int) -> Iterator[bytes]:
    engine = zlib.decompressobj(form)
    for at in range(start, len(content), 4096):
        if engine.eof:
            return
        yield engine.decompress(content[at : at + 4096])


def _joined(pieces: Iterable[bytes]) -> bytes:
    """Join pieces up to where the rest is damaged, as where a stream was no stream at all."""
    found = bytearray()
    with suppress(zlib.error, OSError):
        for piece in pieces:
            found += piece
            if len(found) > _LARGEST:
                break
    return bytes(found)


def contents_of(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Yield every file below a folder, and every value of a database, which may have one in two pages."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            content = file.read_bytes()
            yield file, content
            if content.startswith(b"SQLite format 3"):
                yield file, b"\n".join(_values_of(file))


def _values_of(file: Path) -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as copies:
        for part in file.parent.glob(file.name + "*"):  # the journal of what is not in the file yet
            shutil.copy(part, copies)
        with closing(sqlite3.connect(Path(copies) / file.name)) as database:
            names = [
                name for (name,) in database.execute("select name from sqlite_master where type = 'table'")
            ]
            rows = [row for name in names for row in database.execute(f'select * from "{name}"')]
    return [value if isinstance(value, bytes) else str(value).encode() for row in rows for value in row]
