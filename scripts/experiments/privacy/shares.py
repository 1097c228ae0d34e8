"""What it costs that no server is trusted with the noise: its own noise against clients' shares under masks.

Two parts of the privacy experiment that differ by nothing else. 96 clients take part in every round, since
no coin amplifies noise that clients add. Epsilon is the same, but where all clients answer their shares add
up to 1.22 times the noise that a server adds.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from fedllm.config.key import Scalar
from scripts.experiments.privacy.study import Part
from scripts.experiments.privacy.tables import UNBUDGETED
from scripts.reports import Goal
from scripts.studies.trials import Figures

SERVER, SHARES = "noise of a server", "shares of noise"
_CLIENTS: dict[str, Scalar] = {
    "data.partition": "dirichlet:domain:1.0",
    "aggregation.weighting": "uniform",
    "federation.num-clients": 96,
    "federation.num-rounds": 6,
    "train.local-steps": 2,
    "train.batch-size": 4,
    "data.held-out-fraction": 0.1,
    "data.max-held-out": 4,
}
_BY_SERVER = Part(
    SERVER,
    flat=_CLIENTS,
    private={"privacy.unit": "client", "privacy.trust": "central", "privacy.delta": 1e-3},
    presets=("ffa",),
    epsilons=(3.0, 8.0),
    seeds=(1, 2, 3),
    rates=(3e-2,),  # rate and clip are those of the part with 140 clients, on a seed that is not reported
    private_rates=(3e-2,),
    clips=(2.0,),
)
_IN_SHARES: dict[str, Scalar] = {"privacy.trust": "distributed", "secure.method": "masks"}
_QUICK: dict[str, Scalar] = {
    **{"federation.num-clients": 12, "federation.num-rounds": 2, "train.local-steps": 1},
    "train.batch-size": 2,
}


def shares_parts(*, quick: bool) -> tuple[Part, ...]:
    """Return both parts."""
    central = _BY_SERVER
    if quick:
        # So few clients learn nothing under this noise: it shows that the study runs, and misses its goal.
        central = replace(central, flat={**_CLIENTS, **_QUICK}, epsilons=(8.0,), seeds=(1, 2))
    return central, replace(central, name=SHARES, private={**central.private, **_IN_SHARES})


def shares_goals(parts: Mapping[str, Figures]) -> dict[str, Goal]:
    """Return by epsilon how much higher the loss is with shares, over two deviations of the difference."""
    if not {SERVER, SHARES} <= parts.keys():
        return {}
    by_server, in_shares = (
        {row["budget"]: row["mean_after"] for row in parts[name]["rows"] if row["budget"] not in UNBUDGETED}
        for name in (SERVER, SHARES)
    )
    return {
        f"loss_by_shares_over_its_noise, epsilon {epsilon:g}": Goal(
            (in_shares[epsilon]["mean"] - by_server[epsilon]["mean"])
            / (2 * math.hypot(in_shares[epsilon]["sd"], by_server[epsilon]["sd"])),
            1.0,
            at_most=True,
        )
        for epsilon in sorted(by_server.keys() & in_shares.keys())
    }
