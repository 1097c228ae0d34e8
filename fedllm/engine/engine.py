"""The one engine: many clients' adapters trained, evaluated and sampled at once on one resident frozen base.

Clients share every forward and backward pass of the frozen layers; their adapters, losses, clipping and
optimizer rows stay apart, so each result is what training that client alone gives (up to rounding; bit for
bit where every client has a pass of its own, `token_budget=1`). The plain twin is `fedllm.engine.plain`.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState, with_rank
from fedllm.engine.adapter_bank import Bank
from fedllm.engine.example_gradients import add_noise, clip_factors, diverged, drop
from fedllm.engine.generate import Choice, answers, continuations
from fedllm.engine.gradient_terms import ControlCorrection, control_correction, proximal_pull
from fedllm.engine.job_rows import JobRows, rows_of_jobs
from fedllm.engine.jobs import EvaluationJob, Job, Result, is_finite, row_seed
from fedllm.engine.kernels import LoopKernel, MaskedKernel
from fedllm.engine.layers import attached
from fedllm.engine.optimizer import RowAdamW
from fedllm.engine.passes import Item, Passes, by_adapters, packed
from fedllm.engine.probe import (
    can_be_ragged,
    check_causal,
    keeps_apart,
    longest_pass,
    measured_budget,
    mixes_examples,
    plain_head,
    remembered_budget,
)
from fedllm.messages import ClientEvaluation
from fedllm.models.base import BaseModel, check_fits
from fedllm.models.chat import IGNORED, Encoded

CPU_TOKEN_BUDGET = 512  # more no longer speeds a CPU up, and spills out of its caches
CPU_STEP_TOKENS = 4096  # a step is split above, for memory's sake

_logger = logging.getLogger("fedllm.training")


class Engine:
    """Trains, evaluates and generates with adapters of one layout on one base model.

    `token_budget` is the number of tokens a forward pass holds ("auto" = 512 on a CPU, measured on a GPU):
    clients are fused until it is full, and a step that exceeds it is split (on a CPU from 4,096 tokens). It
    changes speed and rounding, nothing else.
    """

    def __init__(self, base: BaseModel, layout: AdapterLayout, *, token_budget: int | str = "auto"):
        check_fits(layout, base)
        self.base = base
        self.layout = layout
        # Adapters are trained in float32, also on a bfloat16 base; float64 is for exactness tests.
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        kernel = MaskedKernel() if base.device.type == "cuda" else LoopKernel()
        self.bank = Bank(layout, kernel, base.device, dtype)
        check_causal(base.model, base.device)
        self.is_ragged = can_be_ragged(base.model, base.device)
        self._keeps_examples_apart = False  # not tried yet
        self.passes = Passes(base, self.bank, plain_head(base.model, base.device))
        if not self.is_ragged:
            kind = type(base.model).__name__
            _logger.warning("%s cannot attend over a flat row: its samples are trained one at a time", kind)
        budget = token_budget if isinstance(token_budget, int) else self._default_budget()
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
            yield from self._train_group(group)

    def _groups(self, jobs: Sequence[Job]) -> Iterator[list[Job]]:
        """Split jobs into neighbours that train one part, have one objective and fit a pass together."""
        for _, same in groupby(jobs, key=lambda job: (job.trained, id(job.objective))):
            together = list(same)
            sizes = [max(sum(len(row.tokens) for row in batch) for batch in job.batches) for job in together]
            yield from packed(together, sizes, self._limit)

    def _train_group(self, jobs: Sequence[Job]) -> list[Result]:
        """Train jobs together, and once more alone any that is not finite: a neighbour may have spoilt it."""
        began = time.perf_counter()
        # The longest first: those still at work are always the first rows of the bank.
        order = sorted(range(len(jobs)), key=lambda place: -len(jobs[place].batches))
        ordered = [jobs[place] for place in order]
        losses_SC, rows, moved_CP, correction = self._train_rows(ordered)
        seconds = (time.perf_counter() - began) / max(1, sum(job.num_tokens for job in jobs))
        results: dict[int, Result] = {}  # by the place of the job among those given
        for row, (place, job) in enumerate(zip(order, ordered, strict=True)):
            delta = rows.unstack(row, moved_CP[row])
            losses = losses_SC[: len(job.batches), row].tolist()
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
            )
            if len(jobs) > 1 and not is_finite(result):
                (result,) = self._train_group([job])
            results[place] = result
        return [results[place] for place in range(len(jobs))]

    def _train_rows(
        self, jobs: Sequence[Job]
    ) -> tuple[torch.Tensor, JobRows, torch.Tensor, ControlCorrection | None]:
        """Train jobs sorted by falling number of steps, side by side.

        Returns (losses [steps, C], the rows, what each has moved [C, P], SCAFFOLD's sums if any).
        """
        rows = rows_of_jobs(jobs, self.layout)
        starts, scales = rows.pad([job.start for job in jobs]), [layout.scale for layout in rows.layouts]
        self.bank.load(rows.widest, starts, scales, rows.trained)
        begin_CP = self.bank.theta_CP.clone()  # the optimizer changes theta in place
        trainings = [job.training for job in jobs]
        movable_CP = rows.stack([job.movable for job in jobs], default=True)
        optimizer = RowAdamW(self.bank.theta_CP, trainings, movable_CP)
        anchors = rows.pad([job.start if job.anchor is None else job.anchor for job in jobs])
        pull = proximal_pull(self.bank, anchors, trainings)
        corrections_CP = rows.stack([job.correction for job in jobs], default=0.0)
        correction = control_correction(corrections_CP, self.bank.theta_CP, trainings)
        losses_SC = torch.zeros(len(jobs[0].batches), len(jobs), dtype=torch.float64)
        with attached(self.base.model, self.bank, is_ragged=self.is_ragged):
            for step in range(len(jobs[0].batches)):
                active = [job for job in jobs if step < len(job.batches)]
                grads, losses = self.step_gradients(active, step)
                add_noise(rows, grads, step)
                if correction is not None:
                    correction.apply(grads)
                if pull is not None:
                    pull.add_gradient(self.bank, grads)
                optimizer.step(grads)
                losses_SC[step, : len(active)] = losses
        return losses_SC, rows, (self.bank.theta_CP - begin_CP).cpu(), correction

    def step_gradients(self, jobs: Sequence[Job], step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient [A, P] and the mean token loss [A] of one step of every active job.

        The bank holds the jobs' adapters, in this order, and is attached to the model.
        """
        batches = [job.batches[step] for job in jobs]
        items: list[Item] = []
        for client, (job, batch) in enumerate(zip(jobs, batches, strict=True)):
            num_supervised = sum(row.num_supervised for row in batch)
            for number, row in enumerate(batch):
                weight = 1 / (row.num_supervised if job.example_clip else num_supervised)
                dropout = job.training.dropout
                seed = row_seed(job, step, number) if dropout else 0
                items.append(Item(row, client, client, weight, dropout, seed))
        num_supervised_A = torch.tensor([sum(row.num_supervised for row in batch) for batch in batches])
        num_supervised_A.clamp_(min=1)  # a batch drawn by coins may be empty
        if any(job.example_clip for job in jobs):
            grad_AP, losses_A = self._clipped_gradients(jobs, items)
            return grad_AP, losses_A / num_supervised_A
        self.bank.reserve(len(jobs))
        losses_A = torch.zeros(len(jobs), dtype=torch.float64)
        for part in self._split(items, self._step_limit):
            sums = self.passes.losses(part, backward=True, objective=jobs[0].objective)
            losses_A.index_add_(0, _owners(part), sums)
        return self.bank.grad_SP, losses_A / num_supervised_A

    def _clipped_gradients(
        self, jobs: Sequence[Job], items: Sequence[Item]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return per job the sum of its examples' gradients, each clipped, over its batch size [A, P], and
        its summed token loss [A].

        An example is a slot of one pass, so no more gradients are held than a pass has examples.
        """
        parts = list(self._split(items, self._limit))
        losses_A = torch.zeros(len(jobs), dtype=torch.float64)
        total_AP = torch.zeros_like(self.bank.theta_CP[: len(jobs)])
        most = max(map(len, parts), default=0)
        while parts:
            part = parts.pop(0)
            self.bank.reserve(most)
            slots = [replace(item, slot=slot) for slot, item in enumerate(part)]
            sums_B = self.passes.losses(slots, backward=True, objective=jobs[0].objective)
            grad_SP = self.bank.grad_SP[: len(part)]
            norms_S = torch.linalg.vector_norm(grad_SP, dim=1)
            owners = [item.client for item in part]
            lost_S = diverged(jobs, owners, norms_S, sums_B)
            if len(part) > 1 and bool(lost_S.any()):
                # Some kernels mix 0 times a row's gradient into its neighbours', and 0 times NaN is NaN: what
                # one row is would decide about others, beyond its clip. Alone it can only lose itself.
                parts[:0] = [[item] for item in part]
                continue
            drop(lost_S, grad_SP, norms_S, sums_B)
            losses_A.index_add_(0, _owners(part), sums_B)
            # One product reads the gradients once. It also mixes 0 times a diverged client's gradient into
            # its neighbours', which are then trained again alone (`_train_group`).
            total_AP.addmm_(clip_factors(jobs, owners, norms_S), grad_SP)
        return total_AP, losses_A

    def _check_examples(self) -> None:
        """Try on this model under adapters whether an example's states are its own, else feed each alone."""
        draw = torch.Generator().manual_seed(0)
        starts = [torch.randn(self.layout.size, generator=draw) * 0.1 for _ in range(2)]
        self.bank.load(self.layout, starts, [self.layout.scale] * 2)

        def states_of(rows: Sequence[Encoded]) -> Sequence[torch.Tensor]:
            # Another seed each, so that none shares its beginning, as in training.
            items = [Item(row, place // 2, 0, 1.0, seed=place) for place, row in enumerate(rows)]
            states_ND = torch.cat([self.passes.states(part) for part in self._split(items, self._limit)])
            return torch.split(states_ND.float(), [row.num_supervised for row in rows])

        with torch.no_grad(), attached(self.base.model, self.bank, is_ragged=self.is_ragged):
            self._keeps_examples_apart = keeps_apart(states_of, self.base.model)
        if not self._keeps_examples_apart and self.is_ragged:
            self.is_ragged = False
            self._check_examples()
        elif not self._keeps_examples_apart:
            raise mixes_examples(self.base.model)

    # --- passes -------------------------------------------------------------------------------------------

    @property
    def _limit(self) -> int:
        """Tokens up to which clients share a pass; 0 keeps samples apart where attention cannot be ragged."""
        return self.token_budget if self.is_ragged else 0

    @property
    def _step_limit(self) -> int:
        """Tokens above which a step is split. On a CPU only memory asks for it, so it is above the budget."""
        is_roomy = self.is_ragged and self.base.device.type == "cpu"
        most = min(CPU_STEP_TOKENS, longest_pass(self.base.model))
        return max(self._limit, most) if is_roomy else self._limit

    def _split(self, items: Sequence[Item], limit: int) -> Iterator[list[Item]]:
        """Split samples into forward passes of at most `limit` tokens."""
        return packed(items, [len(item.row.tokens) for item in items], limit)

    def _default_budget(self) -> int:
        """Return 512 on a CPU, where caches decide and a busy machine spoils a measurement; else measure."""
        if self.base.device.type == "cpu":
            return CPU_TOKEN_BUDGET
        return remembered_budget(self._machine(), self._measure_budget)

    def _machine(self) -> str:
        """Return what a measured token budget depends on."""
        device = self.base.device
        name = torch.cuda.get_device_name(device)
        parts = (self.layout.fingerprint[:16], device.type, name, self.base.dtype, self.layout.size)
        return " / ".join(map(str, parts))

    def _measure_budget(self) -> int:
        """Return the budget found by timing passes of samples of 64 tokens, a quarter of them learnt."""
        if not self.is_ragged:
            return 1
        vocabulary = self.base.model.config.get_text_config().vocab_size

        def row(number: int) -> Encoded:  # no two begin alike, so nothing is shared
            tokens = tuple((7919 * index + number) % vocabulary for index in range(64))
            return Encoded(tokens, (IGNORED,) * 48 + tokens[48:])

        self.bank.load(self.layout, [torch.zeros(self.layout.size)], [1.0])

        def run_pass(size: int) -> None:
            self.bank.reserve(1)
            self.passes.losses([Item(row(number), 0, 0, 1.0) for number in range(size // 64)], backward=True)

        with attached(self.base.model, self.bank, is_ragged=self.is_ragged):
            return measured_budget(run_pass, self.base.device)

    # --- evaluation ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def evaluate(self, jobs: Sequence[EvaluationJob]) -> list[ClientEvaluation]:
        """Return the mean loss over the supervised tokens of every job's rows, at least one row each.

        Jobs may share an adapter (the same vector object) or each bring their own, of any rank.
        """
        done: list[ClientEvaluation] = []
        for group in by_adapters(jobs):
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
            sums = torch.zeros(len(group), dtype=torch.float64)
            with attached(self.base.model, self.bank, is_ragged=self.is_ragged):
                for part in self._split(items, self._limit):
                    owners = torch.tensor([item.slot for item in part])
                    sums.index_add_(0, owners, self.passes.losses(part, backward=False))
            for job, total in zip(group, sums.tolist(), strict=True):
                number = sum(row.num_supervised for row in job.rows)
                done.append(
                    ClientEvaluation(
                        client_id=job.client_id,
                        loss=total / number,
                        num_tokens=number,
                        num_rows=len(job.rows),
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
        with attached(self.base.model, self.bank, is_ragged=self.is_ragged):
            states = torch.cat([self.passes.states(part) for part in self._split(items, self._limit)])
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
        for places in self._batches(len(beginnings)):
            with self._whole_rows(layout, [vectors[place] for place in places]):
                batch = [beginnings[place] for place in places]
                found += continuations(self.base, batch, max_new_tokens, partial(choose, places))
        return found

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


def _owners(items: Sequence[Item]) -> torch.Tensor:
    """Return the client of every sample, [B]."""
    return torch.tensor([item.client for item in items])
