"""The text that the students of a round learn on and are judged by."""

from fedllm.config.run_config import RunConfig
from fedllm.plan.run_plan import distillation_of, resolve
from scripts.experiments.distillation.last_round import Round
from strategies.distillation.material import Material, make_material
from strategies.distillation.originality import text_screen
from strategies.distillation.public_text import open_public_text
from strategies.distillation.synthetic_text import writers_of


def material_of(last: Round, config: RunConfig) -> Material:
    """Return the rows to learn on and to judge by with the `distill.text` of a configuration.

    Raises:
        FedLLMError: the text cannot be used.
    """
    plan, round_num = resolve(config), config.federation.num_rounds
    public = open_public_text(plan.distillation, config.data)
    screen = text_screen(last.session, last.engine, last.clients, round_num)
    writers = writers_of(plan, last.engine, last.clients, round_num)
    return make_material(distillation_of(plan), public, writers, screen)
