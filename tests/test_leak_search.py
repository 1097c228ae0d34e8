"""The search for canaries finds them wherever they could hide, and nothing else."""

import base64
import gzip
import io
import json
import sqlite3
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from tests.leak_search import Canaries, contents_of

TEXT, IDS = "9f3a7c21d05be846", tuple(range(300, 316))
CANARIES = Canaries((TEXT,), (IDS,))


def zipped(content: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("inside", content)
    return archive.getvalue()


def zstandard(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def chunked(content: bytes) -> bytes:
    return b"transfer-encoding: chunked\r\n\r\n5\r\n" + content[:5] + b"\r\nff\r\n" + content[5:]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zlib.compress, zipped, zstandard, chunked])
@pytest.mark.parametrize(
    "hidden",
    [
        TEXT.encode(),
        TEXT.encode("utf-16-le"),
        json.dumps({"row": f"ü {TEXT}"}).encode(),
        base64.b64encode(f"a row: {TEXT}.".encode()),
        *(np.array([7, *IDS, 8], kind).tobytes() for kind in ("<i2", "<i4", "<i8")),
        f"cannot train on {[7, *IDS]}".encode(),
    ],
)
def test_a_canary_is_found(hidden: bytes, pack: Callable[[bytes], bytes]) -> None:
    noise = np.random.default_rng(0).bytes(50_000)
    assert CANARIES.found_in(noise + pack(b"before " + hidden + b" after") + noise)


def test_what_is_packed_twice_is_found() -> None:
    assert CANARIES.found_in(zipped(gzip.compress(TEXT.encode()))) == ["utf-8"]


def test_noise_and_other_text_are_no_canary() -> None:
    noise = np.random.default_rng(1).bytes(1_000_000)
    assert CANARIES.found_in(noise + b"9f3a7c21d05be84 and 6, 300, 301, 303") == []


def test_values_of_a_database_are_found_across_its_pages(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "state.db")
    database.execute("pragma journal_mode = wal")
    database.execute("create table messages (content blob)")
    database.execute("insert into messages values (?)", [b"x" * 4070 + TEXT.encode() * 300])
    database.commit()
    found = [CANARIES.found_in(content) for file, content in contents_of(tmp_path) if file.name == "state.db"]
    assert found[1] == ["utf-8"]
    database.close()
