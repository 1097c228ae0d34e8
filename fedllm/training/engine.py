"""The one training engine: jobs in, results out, over one resident frozen base model.

A result depends on nothing but its own job: jobs may come in any order, grouping or process. The plain twin
that this engine must agree with is `fedllm.training.plain`.
"""

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from fedllm.adapters.layout import AdapterLayout, AdapterState
from fedllm.data.example import Turn
from fedllm.errors import LayoutError
from fedllm.models.attention import ragged, supports_ragged
from fedllm.models.base import BaseModel
from fedllm.models.chat import Encoded, chat_text
from fedllm.models.lora import FlatAdapter, attached
from fedllm.training.forward import lay_out, summed_loss
from fedllm.training.jobs import Job, Result
from fedllm.training.optimizer import FlatAdamW
from fedllm.types import ClientEvaluation

TOKENS_PER_PASS = 4096  # rows beyond it go into a further pass of the same step; the sum is the same


class Engine:
    """Trains, evaluates and generates with adapters of one layout on one base model."""

    def __init__(self, base: BaseModel, layout: AdapterLayout):
        if layout.fingerprint != base.fingerprint:
            raise LayoutError(
                f"the run's base model ({layout.fingerprint[:12]}) is not the one on this machine"
                f" ({base.fingerprint[:12]}); use the model, revision and tokenizer the run names"
            )
        self.base = base
        self.layout = layout
        # Adapters are trained in float32 whatever the base holds; float64 is for exactness tests.
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        self.adapter = FlatAdapter(layout, base.device, dtype)
        self.is_ragged = supports_ragged(base.model)

    def train(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """Yield the result of every job, in order. A diverged job has one too, which is not finite."""
        for job in jobs:
            with attached(self.base.model, self.adapter), ragged(self.base.model):
                result = self._train_one(job)
            yield result

    def _train_one(self, job: Job) -> Result:
        began = time.perf_counter()
        adapter = self.adapter
        adapter.write(job.start)
        start = adapter.vector.clone()
        optimizer = FlatAdamW(adapter.vector, job.training)
        losses = []
        for batch in job.batches:
            adapter.grad.zero_()
            losses.append(self._backward(batch))
            with torch.no_grad():
                optimizer.step(adapter.grad)
        delta = (adapter.vector.detach() - start).cpu()
        loss = float(torch.stack(losses).mean())
        return Result(
            job.client_id,
            delta,
            loss,
            num_rows=sum(len(batch) for batch in job.batches),
            num_tokens=sum(len(row.tokens) for batch in job.batches for row in batch),
            seconds=time.perf_counter() - began,
        )

    def _backward(self, batch: Sequence[Encoded]) -> torch.Tensor:
        """Add the gradient of the batch's mean token loss to the flat gradient; return that loss."""
        num_supervised = sum(row.num_supervised for row in batch)
        total = torch.zeros((), device=self.base.device, dtype=self.adapter.vector.dtype)
        for rows in self._passes(batch):
            loss = summed_loss(self.base.model, lay_out(rows, self.base.device)) / num_supervised
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _passes(self, rows: Sequence[Encoded]) -> Iterator[list[Encoded]]:
        """Split rows into forward passes: as many as fit the limit, or one each without ragged attention."""
        limit = TOKENS_PER_PASS if self.is_ragged else 0
        current: list[Encoded] = []
        for row in rows:
            if current and sum(len(r.tokens) for r in current) + len(row.tokens) > limit:
                yield current
                current = []
            current.append(row)
        if current:
            yield current

    @torch.inference_mode()
    def evaluate(self, client_id: str, state: AdapterState, rows: Sequence[Encoded]) -> ClientEvaluation:
        """Return the mean loss of `state` over the supervised tokens of `rows`, at least one row."""
        self.adapter.write(state.vector)
        total = 0.0
        with attached(self.base.model, self.adapter), ragged(self.base.model):
            for batch in self._passes(rows):
                total += float(summed_loss(self.base.model, lay_out(batch, self.base.device)))
        num_tokens = sum(row.num_supervised for row in rows)
        return ClientEvaluation(
            client_id=client_id, loss=total / num_tokens, num_tokens=num_tokens, num_rows=len(rows)
        )

    @torch.inference_mode()
    def generate(self, state: AdapterState, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Return the greedy answer of the base model with `state` to every prompt."""
        self.adapter.write(state.vector)
        tokenizer, answers = self.base.tokenizer, []
        with attached(self.base.model, self.adapter):
            for prompt in prompts:
                text = chat_text(tokenizer, [Turn("user", prompt)], prompt_answer=True)
                inputs = tokenizer(
                    text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt"
                ).to(self.base.device)
                output = self.base.model.generate(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.eos_token_id,
                )
                new_tokens = output[0, inputs["input_ids"].shape[1] :]
                answers.append(tokenizer.decode(new_tokens, skip_special_tokens=True).strip())
        return answers


@lru_cache(maxsize=1)
def resident_engine(base: BaseModel, layout: AdapterLayout) -> Engine:
    """Return this process's engine for `base` and `layout`, built on first use."""
    return Engine(base, layout)
