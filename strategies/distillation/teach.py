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
class Chosen:
    """The teacher of a step, and its own loss on held-out text.

    `note` says why it is another than the configured one; "" where it is that one.
    """

    teacher: Teacher
    loss: float
    note: str


def choose_teacher(
    engine: Engine,
    numbers: DistillConfig,
    adapters: Sequence[ClientAdapter],
    material: Material,
    base: float,
) -> Chosen:
    """Return the teacher that knows held-out text.

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
    loss = teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss
    is_public = material.texts.held_out_kind == PUBLIC
    # `not <=`: a loss that is not a number counts as worse.
    if teacher.kind != "posterior" or not is_public or loss <= base:
        return Chosen(teacher, loss, "")
    note = (
        f" (the public text is in no client's support: posterior {loss:.3f} is worse than the base"
        f" model's {base:.3f}, so all clients weighed alike)"
    )
    teacher = replace(teacher, kind="uniform")
    return Chosen(teacher, teach(engine, teacher, material.held_out, top_k=numbers.top_k).loss, note)


@dataclass(frozen=True, eq=False)
class Lesson:
    """The teacher's targets for the rows, its own loss on held-out ones, and who taught."""

    targets: Targets
    ensemble: float
    teachers: DistillationTeachers


def ask_teacher(
    engine: Engine, chosen: Chosen, top_k: int, adapters: Sequence[ClientAdapter], material: Material
) -> Lesson:
    """Return what the chosen teacher says of the rows to distil on."""
    targets = teach(engine, chosen.teacher, material.rows, top_k=top_k, hindsight=True)
    names = [adapter.client_id for adapter in adapters]
    weights = _mean_weights(targets.weights_NK, names, material)
    teachers = DistillationTeachers(
        kind=chosen.teacher.kind, number=len(adapters), entropy=targets.entropy, weights=weights
    )
    return Lesson(targets, chosen.loss, teachers)


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
