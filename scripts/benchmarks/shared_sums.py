"""What sums by shares cost, which a blind relay passes on: bytes, and CPU seconds of parties and holders.

As in `scripts.benchmarks.secure` the protocol alone is measured, and the sum must be the plain sum of the
ring bit for bit.
"""

from functools import partial
from typing import Any

import numpy as np

from fedllm.secure.additive import Relay, add_share, open_sum, share, total_of
from fedllm.secure.agreement import derived, public_of
from fedllm.secure.masking import plain_sum
from fedllm.secure.parties import Exchange, Party
from fedllm.secure.ring import BITS
from scripts.benchmarks.timing import timed
from scripts.reports import spread


def _drawn(number: int, num_values: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 2**BITS, num_values).astype(np.uint32) for _ in range(number)]


def measured_shared(number: int, lost: int, num_values: int) -> dict[str, Any]:
    """Return the figures of one sum by shares: CPU seconds of a party, and of one that also holds shares."""
    keys = {f"{at:03d}": derived(b"benchmark", at) for at in range(number)}
    exchange = Exchange(derived(b"label"), tuple(Party(name, public_of(key)) for name, key in keys.items()))
    relay = Relay(exchange, exchange.names[:3])
    answered = exchange.names[: number - lost]
    vectors = dict(zip(answered, _drawn(len(answered), num_values), strict=True))
    parties, holders, largest = [], [], 0
    sums = {holder: np.zeros(num_values, np.uint32) for holder in relay.holders}
    holding = dict.fromkeys(relay.holders, 0.0)
    for name, words in vectors.items():
        boxes = timed(partial(share, name, keys[name], relay, words, keys[name]))
        parties.append(boxes.timing.cpu)
        largest = max(largest, sum(map(len, boxes.value.values())))
        for holder in relay.holders:
            box, key = boxes.value[holder], keys[holder]
            added = timed(partial(add_share, sums[holder], holder, key, relay, name, box))
            holding[holder] += added.timing.cpu
    openings = {}
    for holder in relay.holders:
        opened = timed(partial(open_sum, holder, keys[holder], relay, answered, sums[holder], keys[holder]))
        openings[holder] = opened.value
        holders.append(holding[holder] + opened.timing.cpu)
    last = exchange.names[-1]
    found = timed(partial(total_of, last, keys[last], relay, answered, openings, num_values))
    opened_bytes = max(len(one.content) + sum(map(len, one.boxes.values())) for one in openings.values())
    return {
        "values": num_values,
        "parties": number,
        "lost": lost,
        "party_cpu_s": spread([seconds + found.timing.cpu for seconds in parties]),
        "holder_cpu_s": max(holders),
        "up_bytes": largest,
        "second_up_bytes": opened_bytes,
        "over_float32": largest / (4 * num_values),
        "is_exact": bool(np.array_equal(found.value, plain_sum(list(vectors.values())))),
    }
