"""How large each study is: for the small model, in a hurry, and for the 135M model.

Every number that decides what a study costs or shows stands here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.config.key import Scalar
from scripts.experiments.aggregation.methods import LOCAL_ONLY, METHODS, MethodsGrid
from scripts.experiments.aggregation.poison import HUGE_FLIP, RULES, UNGUARDED, PoisonGrid
from scripts.experiments.aggregation.rho_map import DOMAIN, IID, MapGrid
from scripts.experiments.options import ONE_THREAD
from scripts.experiments.small_model import Recipe


@dataclass(frozen=True)
class Size:
    """One size of everything: `flat` holds the keys of all runs; a study without a grid is left out."""

    flat: Mapping[str, Scalar]
    rows_of_domain: int
    methods: MethodsGrid
    rho_map: MapGrid
    poison: PoisonGrid | None
    recipe: Recipe | None = None  # of the small model


_SEVEN: dict[str, Scalar] = {"federation.num-clients": 7, "data.partition": "column:domain"}
_TEN: dict[str, Scalar] = {
    "federation.num-clients": 10,
    "federation.max-retries": 0,  # a model that is destroyed stays so
    "aggregation.weighting": "uniform",
}
_FLAT: dict[str, Scalar] = {
    **ONE_THREAD,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "data.max-rows": 160,
    "data.held-out-fraction": 0.2,
    "data.max-held-out": 24,
    "train.batch-size": 4,
    "train.max-length": 128,
}

FULL = Size(
    flat=_FLAT,
    rows_of_domain=240,
    methods=MethodsGrid(
        flat={**_SEVEN, "federation.num-rounds": 8, "train.local-steps": 5},
        rates=(3e-3, 1e-2, 3e-2),
        tuning_seed=0,
        seeds=(1, 2, 3),
        dirichlet={"data.partition": "dirichlet:domain:0.3", "federation.num-clients": 8},
        ranks={"lora.client-ranks": "2,4,8"},
    ),
    rho_map=MapGrid(
        flat={"federation.num-rounds": 3, "train.batch-size": 2, "data.max-held-out": 12},
        clients=(2, 7, 14),
        local_steps=(2, 8, 32),
        rates=(3e-3, 1e-2),
        skews=(IID, DOMAIN),
        seeds=(1,),
    ),
    poison=PoisonGrid(
        flat={
            **_TEN,
            "federation.num-rounds": 8,
            "train.local-steps": 8,
            "train.batch-size": 2,
            "train.learning-rate": 1e-2,
            "data.max-held-out": 10,
        },
        skews=("dirichlet:domain:1.0",),
        attacks={
            HUGE_FLIP: (1, 2),
            UNGUARDED: (1, 2),
            "flip within bound": (1, 2),
            "flip at bound": (2,),
            "noise within bound": (2,),
            "labels": (2,),
        },
        rules=RULES,
        seed=1,
    ),
    recipe=Recipe(),
)

QUICK = Size(
    flat={
        **_FLAT,
        "data.max-rows": 32,
        "data.max-held-out": 4,
        "train.batch-size": 2,
        "train.max-length": 96,
    },
    rows_of_domain=64,
    methods=MethodsGrid(
        flat={**_SEVEN, "federation.num-rounds": 2, "train.local-steps": 2},
        rates=(3e-3, 1e-2),
        tuning_seed=0,
        seeds=(1,),
    ),
    rho_map=MapGrid(
        flat={"federation.num-rounds": 2},
        clients=(2, 7),
        local_steps=(1, 4),
        rates=(1e-2,),
        skews=(IID, DOMAIN),
        seeds=(1,),
    ),
    poison=PoisonGrid(
        flat={**_TEN, "federation.num-rounds": 2, "train.local-steps": 2, "train.learning-rate": 1e-2},
        skews=("iid",),
        attacks={HUGE_FLIP: (1,), "flip within bound": (1,)},
        rules={name: RULES[name] for name in ("none", "multi-krum")},
        seed=1,
        backdoors={"": (1,)},
        probes=8,
    ),
    recipe=Recipe(steps=100),
)

# One seed, tuned by nothing: what two idle cores do in an hour.
_SMOLLM2_RATE = 1e-3
SMOLLM2 = Size(
    flat={
        **_FLAT,
        "train.max-length": 192,
        "data.max-rows": 64,
        "data.max-held-out": 4,
        "train.learning-rate": _SMOLLM2_RATE,
    },
    rows_of_domain=240,
    methods=MethodsGrid(
        flat={**_SEVEN, "federation.num-rounds": 4, "train.local-steps": 3},
        rates=(_SMOLLM2_RATE,),
        tuning_seed=0,
        seeds=(1,),
        methods={name: METHODS[name] for name in ("fedit", "ffa", "rolora", "flexlora", "fedex")},
        controls=(LOCAL_ONLY,),
    ),
    rho_map=MapGrid(
        flat={"federation.num-rounds": 2, "train.batch-size": 2},
        clients=(2, 7),
        local_steps=(2, 8),
        rates=(_SMOLLM2_RATE,),
        skews=(DOMAIN,),
        seeds=(1,),
    ),
    poison=None,
)
