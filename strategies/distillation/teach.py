"""What the teacher says of a step's texts: the clients' adapters as one ensemble."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedllm.config.key import split_number
from fedllm.config.keys import DistillConfig
from fedllm.distillation.targets import Targets
from fedllm.distillation.teacher import Teacher, teach
from fedllm.engine.engine import Engine
from fedllm.runs.records import DistillationTeachers
from strategies.distillation.losses import group_by_domain
from strategies.distillation.material import PUBLIC, Material
from strategies.distillation.teachers import ClientAdapter, priors_of


@dataclass(frozen=True, eq=False)
class Lesson:
    """The teacher's targets for the rows, its own loss on held-out ones, and who taught.

    `note` says why another teacher than the chosen one taught; "" where none did.
    """

    targets: Targets
    ensemble: float
    teachers: DistillationTeachers
    note: str


def ask_teacher(
    engine: Engine,
    numbers: DistillConfig,
    adapters: Sequence[ClientAdapter],
    material: Material,
    base: float,
) -> Lesson:
    """Return what the chosen teacher says of the material.

    Posterior weights on text that no client models are noise that looks certain. So where the mixture's loss
    on held-out public text is above the base model's (`base`), the uniform teacher takes its place.
    """
    kind, temper = split_number(numbers.teacher, 1.0)
    teacher = Teacher(
        adapters=tuple(adapter.vector for adapter in adapters),
        layout=engine.layout,
        priors=priors_of(adapters),
        kind=kind,
        temper=temper,
    )
    ensemble, note = teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss, ""
    is_public = material.texts.held_out_kind == PUBLIC
    # `not <=`: a loss that is not a number counts as worse.
    if teacher.kind == "posterior" and is_public and not ensemble <= base:
        note = (
            f" (the public text is in no client's support: posterior {ensemble:.3f} is worse than the base"
            f" model's {base:.3f}, so all clients weighed alike)"
        )
        teacher = replace(teacher, kind="uniform")
        ensemble = teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss
    targets = teach(engine, teacher, material.rows, top_k=numbers.top_k)
    names = [adapter.client_id for adapter in adapters]
    weights = _mean_weights(targets.weights_NK, names, material)
    teachers = DistillationTeachers(
        kind=teacher.kind, number=len(adapters), entropy=targets.entropy, weights=weights
    )
    return Lesson(targets, ensemble, teachers, note)


def _mean_weights(
    weights_NK: torch.Tensor, clients: Sequence[str], material: Material
) -> dict[str, dict[str, float]]:
    """Return by domain the mean weight of every client over the predicted tokens."""
    # The targets hold the tokens of all rows end to end.
    by_row = torch.split(weights_NK.double(), [row.num_supervised for row in material.rows])
    return {
        domain: dict(zip(clients, torch.cat(found).mean(dim=0).tolist(), strict=True))
        for domain, found in group_by_domain(material.domains, by_row).items()
    }
