"""What a masked sum costs: bytes over float32, and CPU seconds of a client and of the server.

The protocol of `fedllm.secure.masking` alone, without a network or a model: values are drawn, every party
masks its own vector, some are lost in the first exchange and some in the second. The server adds up answers
as they come, checks the opened shares and takes the masks off; the sum must be the plain sum of the ring bit
for bit.

    python -m scripts.benchmarks secure --quick --json

A client's seconds are those of rounding, masking and opening shares; the server's of unpacking, adding,
checking, and removing masks. Bytes are those a client sends, over its values as float32. Where the extra `he`
is installed, homomorphic encryption of the same ring is measured as well.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from fedllm.secure.agreement import derived, public_of, secret_stream
from fedllm.secure.homomorphic import CipherSum, decrypt, encrypt, new_keys
from fedllm.secure.masking import Masked, check_opening, mask, opening, unmasked
from fedllm.secure.parties import Exchange, Party
from fedllm.secure.ring import BITS, quantise, step_for, unpack
from scripts.benchmarks.options import BenchOptions, start_benchmark
from scripts.benchmarks.shared_sums import measured_shared
from scripts.benchmarks.timing import timed
from scripts.reports import Goal, figures_table, publish, spread

PACKAGES = ("fedllm", "numpy", "cryptography")
LOST = ((10, 3, 0), (10, 2, 1), (30, 10, 0), (30, 5, 5), (100, 33, 0), (100, 20, 13))  # parties, lost in each
GOAL_BYTES, GOAL_CLIENT, GOAL_SERVER = 0.80, 0.3, 6.0
GOAL_HE_BYTES, GOAL_HE = 4.0, 2.0  # seconds to encrypt and decrypt
GOAL_VALUES = 2_442_240  # the adapter for which the goals of seconds are


@dataclass(frozen=True, kw_only=True)
class Options(BenchOptions):
    """What can be asked for; --quick leaves out sums of 100 parties and the larger sizes."""

    values: Annotated[str, typer.Option(help="Values of an adapter; with --quick the first number.")] = (
        f"{GOAL_VALUES},20000000"
    )
    parties: Annotated[int, typer.Option(min=10, help="The most parties of a sum.")] = 100


def measured_sum(number: int, lost_first: int, lost_second: int, num_values: int) -> dict[str, Any]:
    """Return the figures of one masked sum."""
    keys = [derived(b"benchmark", at) for at in range(number)]
    parties = tuple(Party(f"{at:03d}", public_of(key)) for at, key in enumerate(keys))
    exchange = Exchange(derived(b"label"), parties)
    answered = exchange.names[: number - lost_first]
    values = np.random.default_rng(0).normal(scale=1e-3, size=num_values)
    step = step_for(float(np.abs(values).max()), number)
    total, plain = np.zeros(num_values, np.uint32), np.zeros(num_values, np.uint32)
    sent: dict[str, Masked] = {}
    clients, server, num_bytes = dict.fromkeys(answered, 0.0), 0.0, 0
    for name, key in zip(answered, keys, strict=False):
        stream = secret_stream(key, "rounding")
        words = timed(partial(quantise, values, step, stream))
        masked = timed(partial(mask, name, key, exchange, words.value, key))
        unpacked = timed(partial(_add, total, masked.value.packed))
        plain += words.value
        clients[name] += words.timing.cpu + masked.timing.cpu
        server += unpacked.timing.cpu
        message = masked.value
        num_bytes = sum(map(len, (message.packed, *message.boxes, *message.commitments)))
        sent[name] = Masked(b"", message.boxes, message.commitments)
    commitments = {name: message.commitments for name, message in sent.items()}
    openings: dict[str, bytes] = {}
    for at, name in enumerate(answered[: len(answered) - lost_second]):
        boxes = {dealer: message.boxes[at] for dealer, message in sent.items()}
        own = {dealer: message.commitments[at] for dealer, message in sent.items()}
        opened = timed(partial(opening, name, keys[at], exchange, answered, boxes, own))
        checked = timed(partial(check_opening, opened.value, name, exchange, answered, commitments))
        clients[name] += opened.timing.cpu
        server += checked.timing.cpu
        openings[name] = opened.value
    found = timed(partial(unmasked, exchange, total, answered, openings))
    opened_bytes = max(map(len, openings.values()))
    return {
        "values": num_values,
        "parties": number,
        "lost_first": lost_first,
        "lost_second": lost_second,
        "client_cpu_s": spread([clients[name] for name in openings]),
        "server_cpu_s": server + found.timing.cpu,
        "masks_removed": len(answered) * (1 + lost_first),
        "up_bytes": num_bytes,
        "second_up_bytes": opened_bytes,
        "over_float32": (num_bytes + opened_bytes) / (4 * num_values),
        "is_exact": bool(np.array_equal(found.value, plain & np.uint32(2**BITS - 1))),
    }


def measured_encryption(number: int, num_values: int) -> dict[str, Any]:
    """Return the figures of one sum of ciphertexts; the extra `he` must be installed."""
    keys, total = new_keys(), CipherSum(num_values)
    plain = np.zeros(num_values, np.uint32)
    encrypted_s, added_s, num_bytes = [], [], 0
    for party in range(number):
        words = secret_stream(derived(b"benchmark", party)).words(num_values) & np.uint32(2**BITS - 1)
        sent = timed(partial(encrypt, keys.public, words, BITS))
        added = timed(partial(total.add, sent.value, f"{party}"))
        plain += words
        encrypted_s.append(sent.timing.cpu)
        added_s.append(added.timing.cpu)
        num_bytes = len(sent.value)
    found = timed(partial(decrypt, keys.secret, total.content(), num_values, BITS))
    return {
        "values": num_values,
        "parties": number,
        "encrypt_cpu_s": spread(encrypted_s),
        "add_cpu_s": spread(added_s),
        "decrypt_cpu_s": found.timing.cpu,
        "up_bytes": num_bytes,
        "over_float32": num_bytes / (4 * num_values),
        "is_exact": bool(np.array_equal(found.value, plain & np.uint32(2**BITS - 1))),
    }


def _add(total: np.ndarray, packed: bytes) -> None:
    total += unpack(packed, len(total))


def goals_of(sums: Mapping[str, Mapping[str, Any]], encrypted: Mapping[str, Any]) -> dict[str, Goal]:
    """Return the goals, each judged on the worst sum; seconds are those of adapters up to the goal's size."""
    timely = [each for each in sums.values() if each["values"] <= GOAL_VALUES]
    goals = {
        "bytes_over_float32": Goal(
            max(each["over_float32"] for each in sums.values()), GOAL_BYTES, at_most=True
        ),
        "exact_sums": Goal(sum(each["is_exact"] for each in sums.values()), len(sums)),
    }
    if timely:
        client = max(each["client_cpu_s"].median for each in timely)
        goals["client_cpu_s"] = Goal(client, GOAL_CLIENT, at_most=True)
        server = max(each["server_cpu_s"] for each in timely)
        goals["server_cpu_s"] = Goal(server, GOAL_SERVER, at_most=True)
    if encrypted:
        seconds = encrypted["encrypt_cpu_s"].median + encrypted["decrypt_cpu_s"]
        goals["he_bytes_over_float32"] = Goal(encrypted["over_float32"], GOAL_HE_BYTES, at_most=True)
        goals["he_cpu_s"] = Goal(seconds, GOAL_HE, at_most=True)
        goals["exact_he_sums"] = Goal(int(encrypted["is_exact"]), 1)
    return goals


def show(console: Console, sums: Mapping[str, Mapping[str, Any]], encrypted: Mapping[str, Any]) -> None:
    """Print one row for each masked sum, and a line on homomorphic encryption."""
    rows = {
        name: [
            each["client_cpu_s"].text(3),
            f"{each['server_cpu_s']:.2f}",
            f"{each['up_bytes']:,}",
            f"{each['second_up_bytes']:,}",
            f"{each['over_float32']:.4f}",
            "yes" if each["is_exact"] else "NO",
        ]
        for name, each in sums.items()
    }
    columns = ("client", "server", "sent", "opened", "of float32", "exact")
    console.print(
        figures_table(
            "values, parties - lost in the first exchange - in the second; CPU seconds", columns, rows
        )
    )
    if encrypted:
        console.print(
            f"homomorphic: {encrypted['over_float32']:.2f} of float32, encrypt"
            f" {encrypted['encrypt_cpu_s'].median:.2f} s, add {encrypted['add_cpu_s'].median:.2f} s,"
            f" decrypt {encrypted['decrypt_cpu_s']:.2f} s, exact {encrypted['is_exact']}"
        )


def measure(sizes: Sequence[int], most_parties: int) -> dict[str, dict[str, Any]]:
    """Return the figures of every sum by name."""
    return {
        f"{size / 1e6:.1f} M, {number} - {first} - {second}": measured_sum(number, first, second, size)
        for size in sizes
        for number, first, second in LOST
        if number <= most_parties
    }


def main(options: Options) -> None:
    """Measure, print and keep the figures."""
    console, machine = start_benchmark(options, PACKAGES)
    gc.freeze()  # what the libraries hold is not looked through again before each of many timings
    sizes = [int(number) for number in options.values.split(",")]
    sums = measure(sizes[:1] if options.quick else sizes, 30 if options.quick else options.parties)
    encrypted = measured_encryption(10, sizes[0]) if find_spec("tenseal") else {}
    show(console, sums, encrypted)
    shared = measured_shared(10, 3, sizes[0])
    console.print(
        f"shares of a blind relay: {shared['over_float32']:.2f} of float32, party"
        f" {shared['party_cpu_s'].median:.2f} s, holder {shared['holder_cpu_s']:.2f} s, exact"
        f" {shared['is_exact']}"
    )
    figures = {
        "environment": machine,
        "settings": {"bits": BITS},
        "sums": sums,
        "homomorphic": encrypted,
        "shares": shared,
    }
    publish(options, "bench_secure", figures, goals_of(sums, encrypted))
