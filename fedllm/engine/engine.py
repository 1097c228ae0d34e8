"""The one engine: many clients' adapters trained, evaluated and sampled at once on one resident frozen base.

Clients share every forward and backward pass of the frozen layers; their adapters, losses, clipping and
optimizer rows stay apart, so each result is what training that client alone gives (up to rounding; bit for
bit where every client has a pass of its own, `token_budget=1`). The plain twin is `fedllm.engine.plain`.
"""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from itertools import groupby
from typing import TypeVar

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, with_rank
from fedllm.engine.generate import Choice, answers, continuations, stream
from fedllm.engine.jobs import EvaluationJob, Job, Result, is_finite
from fedllm.engine.layers import attached
from fedllm.engine.opening import open_passes
from fedllm.engine.passes import Item, by_adapters, packed, split
from fedllm.engine.probe import keeps_apart, longest_pass, mixes_examples
from fedllm.engine.reading import can_be_fixed
from fedllm.engine.steps import train_rows
from fedllm.engine.token_budget import Limits, default_budget, limits_of, rows_in_memory, smaller_budget
from fedllm.messages import ClientEvaluation
from fedllm.models.base import BaseModel, check_fits
from fedllm.models.chat import Encoded

T = TypeVar("T")


class Engine:
    """Trains, evaluates and generates with adapters of one layout on one base model.

    `token_budget` is the number of tokens a forward pass holds ("auto" = 512 on a CPU in float32, measured on
    a GPU): clients are fused until it is full, and a step that exceeds it is split (on a CPU from 4,096
    tokens). It changes speed and rounding, nothing else.
    """

    def __init__(self, base: BaseModel, layout: AdapterLayout, *, token_budget: int | str = "auto"):
        check_fits(layout, base)
        self.base = base
        self.layout = layout
        self.passes = open_passes(base, layout)
        self.bank = self.passes.bank
        self._keeps_examples_apart = False  # not tried yet
        self._most_rows = rows_in_memory(self.passes)
        budget = token_budget
        if not isinstance(budget, int):
            budget = default_budget(self.passes, self._most_rows)
        self.token_budget = min(budget, longest_pass(base.model))

    # --- training -----------------------------------------------------------------------------------------

    def train(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield the result of every job, in order. A diverged job has one too, which is not finite.

        Raises:
            ModelError: examples are to be private, and the model mixes them even one by one.
        """
        if any(job.example_clip for job in jobs) and not self._keeps_examples_apart:
            self._check_examples()
        for group in self._groups(jobs):
            rows = [row for job in group for row in max(job.batches, key=_num_tokens)]
            yield from self._fitted(partial(self._train_all, group), rows)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Split jobs into neighbours that train one part, have one objective and fit a pass together."""
        for _, same in groupby(jobs, key=lambda job: (job.trained, id(job.objective))):
            together = list(same)
            sizes = [max(map(_num_tokens, job.batches)) for job in together]
            yield from packed(together, sizes, self.limits.together, self.limits.rows)

    def _train_all(self, jobs: Sequence[Job]) -> list[Result]:
        """Train jobs, in as many groups as the token budget now asks for."""
        return [result for group in self._groups(jobs) for result in self._train_group(group)]

    def _train_group(self, jobs: Sequence[Job]) -> list[Result]:
        """Train jobs together, and once more alone any that is not finite: a neighbour may have spoilt it."""
        began = time.perf_counter()
        # The longest first: those still at work are always the first rows of the bank.
        order = sorted(range(len(jobs)), key=lambda place: -len(jobs[place].batches))
        ordered = [jobs[place] for place in order]
        trained = train_rows(self.passes, self.limits, ordered, self.layout)
        rows, correction = trained.rows, trained.correction
        seconds = (time.perf_counter() - began) / max(1, sum(job.num_tokens for job in jobs))
        results: dict[int, Result] = {}  # by the place of the job among those given
        for row, (place, job) in enumerate(zip(order, ordered, strict=True)):
            delta = rows.unstack(row, trained.moved_CP[row])
            losses = trained.losses_SC[: len(job.batches), row].tolist()
            gradient = None
            if correction is not None:
                gradient = rows.unstack(row, correction.sum_CP[row].cpu() / len(job.batches))
            result = Result(
                job.client_id,
                delta,
                loss=sum(losses) / len(losses),
                num_rows=sum(map(len, job.batches)),
                num_tokens=job.num_tokens,
                seconds=seconds * job.num_tokens,
                gradient=gradient,
                losses=tuple(losses),
                snapshots={
                    steps: rows.unstack(row, delta_P) for steps, delta_P in trained.snapshots[row].items()
                },
            )
            if len(jobs) > 1 and not is_finite(result):
                (result,) = self._train_group([job])
            results[place] = result
        return [results[place] for place in range(len(jobs))]

    def _check_examples(self) -> None:
        """Try on this model under adapters whether an example's states are its own, else feed each alone."""
        draw = torch.Generator().manual_seed(0)
        starts = [torch.randn(self.layout.size, generator=draw) * 0.1 for _ in range(2)]
        self.bank.load(self.layout, starts, [self.layout.scale] * 2)

        def states_of(rows: Sequence[Encoded]) -> Sequence[torch.Tensor]:
            # Another seed each, so that none shares its beginning, as in training.
            items = [Item(row, place // 2, 0, 1.0, seed=place) for place, row in enumerate(rows)]
            states_ND = torch.cat([self.passes.states(part) for part in split(items, self.limits.together)])
            return torch.split(states_ND.float(), [row.num_supervised for row in rows])

        with torch.no_grad(), self.passes.attached():
            self._keeps_examples_apart = keeps_apart(states_of, self.base.model)
        if not self._keeps_examples_apart and self.is_ragged:
            self.passes = replace(self.passes, is_ragged=False)
            self._check_examples()
        elif not self._keeps_examples_apart:
            raise mixes_examples(self.base.model)

    @property
    def limits(self) -> Limits:
        """How many tokens the passes hold."""
        return limits_of(self.token_budget, self._most_rows, self.passes)

    @property
    def is_ragged(self) -> bool:
        """Whether samples may share a pass."""
        return self.passes.is_ragged

    def _fitted(self, work: Callable[[], list[T]], rows: Sequence[Encoded]) -> list[T]:
        """Return what `work` gives; where memory runs out it begins again with a smaller token budget.

        `rows` are those that may share a pass. Work has no effect but its result, so nothing counts twice.

        Raises:
            OutOfMemoryError: a row of its own is too much.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                lengths = [len(row.tokens) for row in rows]
                budget = smaller_budget(self.token_budget, lengths) if self.is_ragged else 0
                if not budget:
                    raise
            # Out here no traceback holds on to what the failed pass has made.
            if self.passes.shelf is not None:
                self.passes.shelf.clear()
            self.bank.release()
            torch.cuda.empty_cache()
            self.token_budget = budget

    # --- evaluation ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[ClientEvaluation]:
        """Return the mean loss over the supervised tokens of every job's rows, at least one row each.

        Jobs may share an adapter (the same vector object) or each bring their own, of any rank.
        """
        done: list[ClientEvaluation] = []
        for group in by_adapters(jobs):
            rows = [row for job in group for row in job.rows]
            done += self._fitted(partial(self._evaluate_group, group), rows)
        return done

    def _evaluate_group(self, group: Sequence[EvaluationJob]) -> list[ClientEvaluation]:
        """Evaluate jobs whose adapters are held at once."""
        adapters = {id(job.vector): (job.vector, job.layout or self.layout) for job in group}
        place = {key: row for row, key in enumerate(adapters)}
        widest = max((layout for _, layout in adapters.values()), key=lambda layout: layout.rank)
        vectors = [with_rank(vector, layout, widest.rank) for vector, layout in adapters.values()]
        self.bank.load(widest, vectors, [layout.scale for _, layout in adapters.values()])
        items = [
            Item(row, place[id(job.vector)], number, 1.0)
            for number, job in enumerate(group)
            for row in job.rows
        ]
        with self.passes.attached():
            parts = split(items, self.limits.together)
            sums_B = torch.cat([self.passes.losses(part, backward=False) for part in parts]).cpu()
        sums = torch.zeros(len(group), dtype=torch.float64)
        sums.index_add_(0, torch.tensor([item.slot for item in items]), sums_B)
        done = []
        for job, total in zip(group, sums.tolist(), strict=True):
            number = sum(row.num_supervised for row in job.rows)
            done.append(
                ClientEvaluation(
                    client_id=job.client_id, loss=total / number, num_tokens=number, num_rows=len(job.rows)
                )
            )
        return done

    @torch.no_grad()
    def read(
        self, layout: AdapterLayout, vectors: Sequence[torch.Tensor], rows: Sequence[Encoded]
    ) -> torch.Tensor:
        """Return what the model has computed under each adapter where a learnt token is predicted, [K, N, D].

        The K adapters [P] of `layout` share passes; N are the learnt tokens of all rows, in order.
        """
        self.bank.load(layout, vectors, [layout.scale] * len(vectors))
        items = [Item(row, place, 0, 1.0) for place in range(len(vectors)) for row in rows]
        with self.passes.attached():
            states = torch.cat([self.passes.states(part) for part in split(items, self.limits.together)])
        return states.view(len(vectors), -1, states.shape[-1])

    @torch.no_grad()
    def continue_rows(
        self,
        layout: AdapterLayout,
        vectors: Sequence[torch.Tensor],
        beginnings: Sequence[Sequence[int]],
        max_new_tokens: int,
        choose: Choice,
    ) -> list[tuple[int, ...]]:
        """Return the tokens that `choose` takes after each beginning under its own adapter.

        `vectors[i]` [P] of `layout` goes with `beginnings[i]`; the same vector object is held once.
        """
        found: list[tuple[int, ...]] = []
        is_fixed = self._is_fixed  # tried before an adapter is on the model
        for places in self._batches(len(beginnings)):
            with self._whole_rows(layout, [vectors[place] for place in places]):
                batch = [beginnings[place] for place in places]
                take = partial(choose, places)
                found += continuations(self.base, batch, max_new_tokens, take, is_fixed=is_fixed)
        return found

    @cached_property
    def _is_fixed(self) -> bool:
        """Whether texts are written in a cache of fixed size, as a GPU wants it; tried once, on first use."""
        return self.base.device.type == "cuda" and can_be_fixed(self.base)

    @torch.inference_mode()
    def generate(
        self,
        states: Sequence[AdapterState],
        prompts: Sequence[str],
        max_new_tokens: int,
        *,
        as_plain_text: bool = False,
    ) -> list[str]:
        """Return the greedy answer of `states[i]` to `prompts[i]`; under `as_plain_text`, how it goes on."""
        found: list[str] = []
        for places in self._batches(len(prompts)):
            with self._whole_rows(self.layout, [states[place].vector for place in places]):
                batch = [prompts[place] for place in places]
                found += answers(self.base, batch, max_new_tokens, as_plain_text=as_plain_text)
        return found

    @torch.inference_mode()
    def stream(
        self,
        states: Sequence[AdapterState],
        beginnings: Sequence[Sequence[int]],
        max_new_tokens: int,
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> Generator[dict[int, int], None, None]:
        """Yield step by step what `states[i]` writes after `beginnings[i]`: tokens by i, until all end.

        `choose` takes logits [B, V] and returns tokens [B].
        """
        for places in self._batches(len(beginnings)):
            with self._whole_rows(self.layout, [states[place].vector for place in places]):
                batch = [beginnings[place] for place in places]
                for written in stream(self.base, batch, max_new_tokens, choose):
                    yield {places[row]: token for row, token in written.items()}

    def _batches(self, number: int) -> list[range]:
        """Return which prompts are answered together: all, or one by one where padding could change state."""
        return [range(number)] if self.is_ragged else [range(place, place + 1) for place in range(number)]

    @contextmanager
    def _whole_rows(self, layout: AdapterLayout, vectors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within the block, row i of every batch goes through adapter `vectors[i]`."""
        distinct = list({id(vector): vector for vector in vectors}.values())
        place = {id(vector): row for row, vector in enumerate(distinct)}
        self.bank.load(layout, distinct, [layout.scale] * len(distinct))
        rows = tuple(place[id(vector)] for vector in vectors)
        with attached(self.base.model, self.bank), self.bank.whole_rows(rows):
            yield


def _num_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.tokens) for row in rows)
