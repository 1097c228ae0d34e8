"""The card of a run of secret sums says what each method rests on."""

import pytest

from fedllm.messages import JoinedClient
from fedllm.plan.secure import SecurePlan
from strategies.secure.trust import card_text

CLIENTS = [
    JoinedClient(
        client_id=name, node_id=1, num_train=1, num_held_out=0, fingerprint="", is_pinned=name == "anna"
    )
    for name in ("anna", "ben")
]
RESTS_ON = {
    "masks": "Parties that work with the server",
    "he": "one data holder could decrypt the sum",
    "shares": "Three data holders held the shares",
}


@pytest.mark.parametrize("method", sorted(RESTS_ON))
def test_the_card_says_who_could_read_updates(method: str) -> None:
    text = card_text(SecurePlan(method=method, min_parties=4), CLIENTS)
    assert RESTS_ON[method] in text
    assert "(3 of 4)" in text
    assert "1 of 2 data holders" in text
