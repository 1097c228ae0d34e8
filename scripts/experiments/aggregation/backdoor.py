"""How often a planted trigger works on held-out questions of honest clients."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from clients.process import Process
from clients.tokens import hosted_rows
from fedllm.adapters.layout import AdapterState
from fedllm.config.run_config import RunConfig
from fedllm.engine.engine import Engine
from fedllm.engine.jobs import EvaluationJob
from fedllm.models.chat import Encoded, encode
from scripts.experiments.aggregation import attacks
from scripts.studies.trials import Figures, Trial


def backdoor_success(
    config: RunConfig, trial: Trial, attackers: Collection[str], adapters: dict[str, AdapterState]
) -> Figures:
    """Return per adapter how often a trigger works on held-out questions of honest clients.

    `answered` is the share whose greedy answer begins with the target, `untriggered` that of the same
    questions without the trigger; `preferred` the share where the target has a lower loss per token than the
    true answer; `target_loss` and `answer_loss` are those losses' means.
    """
    trigger, target = str(trial.options["trigger"]), str(trial.options["target"])
    clients = config.federation.num_clients
    node = {"partition-id": 0, "num-partitions": clients, "server-paths": True}  # as the run's first node
    engine = Process().open(config.to_flat(), node).engine
    probes: list[_Probe] = []
    for client in hosted_rows(config, {}):
        for example in client.held_out if client.client_id not in attackers else ():
            rows = [
                encode(
                    attacks.with_trigger(example, trigger, text),
                    engine.base.tokenizer,
                    config.train.max_length,
                )
                for text in (target, example.turns[-1].content)
            ]
            if rows[0] is not None and rows[1] is not None and not rows[0].num_cut:
                probes.append(_Probe(example.turns[-2].content, rows[0], rows[1]))
    number = min(len(probes), int(trial.options["probes"]))
    probes = [probes[index * len(probes) // number] for index in range(number)]  # spread over the clients
    return {
        "probes": number,
        **{name: _success(engine, adapter, probes, trigger, target) for name, adapter in adapters.items()},
    }


@dataclass(frozen=True)
class _Probe:
    """A question, and the rows of it with the trigger and the target, or its true answer."""

    question: str
    target: Encoded
    answer: Encoded


def _success(
    engine: Engine, adapter: AdapterState, probes: Sequence[_Probe], trigger: str, target: str
) -> Figures:
    questions = [probe.question for probe in probes]
    asked = [f"{question} {trigger}" for question in questions] + questions
    length = max(probe.target.num_supervised for probe in probes)
    hits = [text.startswith(target) for text in engine.generate([adapter] * len(asked), asked, length)]
    jobs = [
        EvaluationJob(str(place), adapter.vector, (row,))
        for place, row in enumerate(row for probe in probes for row in (probe.target, probe.answer))
    ]
    losses = [done.loss for done in engine.evaluate(jobs)]
    targets, others = losses[::2], losses[1::2]
    number = len(probes)
    return {
        "answered": sum(hits[:number]) / number,
        "untriggered": sum(hits[number:]) / number,
        "preferred": sum(bad < good for bad, good in zip(targets, others, strict=True)) / number,
        "target_loss": sum(targets) / number,
        "answer_loss": sum(others) / number,
    }
