"""What models say of texts, token by token: one pass over many adapters on the one resident base.

All that the attacks of `membership` and `memorisation` need of a model is computed here, so they are pure.
Tensor suffixes: N learnt token of a text, V vocabulary, D feature, P adapter value.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from torch.nn.functional import linear

from fedllm.lora.bank import Route, segments
from fedllm.lora.layers import attached
from fedllm.models.attention import ragged
from fedllm.models.chat import Encoded
from fedllm.training.engine import Engine, packed
from fedllm.training.forward import FlatRow, lay_out
from fedllm.training.head import CHUNK, precise

ADAPTERS_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class TokenScores:
    """One text under one model: of every learnt token, [N] float64 in nats.

    `means` and `deviations` are those of log p(token) where the token is drawn from the model's own
    next-token law, as Min-K%++ wants them (arXiv 2404.02936). `is_top` says whether greedy decoding would
    choose the token.
    """

    log_probs: torch.Tensor
    means: torch.Tensor
    deviations: torch.Tensor
    is_top: torch.Tensor


def whole(tokens: Sequence[int]) -> Encoded:
    """Return tokens as a row that is learnt, so scored, from its second token on."""
    return Encoded(tuple(tokens), tuple(tokens))


def no_adapter(engine: Engine) -> torch.Tensor:
    """Return the adapter [P] that changes nothing: under it a score is the base model's."""
    return torch.zeros(engine.layout.size)


@torch.inference_mode()
def score(
    engine: Engine, adapters: Sequence[torch.Tensor], rows: Sequence[Encoded]
) -> list[list[TokenScores]]:
    """Return the scores of every row under every adapter [P] of the engine's layout: [adapter][row].

    A row without a learnt token has empty scores. Passes are fused up to the engine's token budget, which
    changes speed and rounding, nothing else.
    """
    found: list[list[TokenScores]] = []
    for begin in range(0, len(adapters), ADAPTERS_AT_ONCE):
        held = adapters[begin : begin + ADAPTERS_AT_ONCE]
        engine.bank.load(engine.layout, held, [engine.layout.scale] * len(held))
        pairs = [(adapter, row) for adapter in range(len(held)) for row in rows]
        done: list[TokenScores] = []
        with attached(engine.base.model, engine.bank), attention(engine):
            for part in packed(pairs, [len(row.tokens) for _, row in pairs], limit(engine)):
                done += _pass(engine, part)
        found += [done[len(rows) * number : len(rows) * (number + 1)] for number in range(len(held))]
    return found


def attention(engine: Engine) -> AbstractContextManager[None]:
    """Return the block within which flat rows of many samples may be fed, where the model can do so."""
    return ragged(engine.base.model) if engine.is_ragged else nullcontext()


def limit(engine: Engine) -> int:
    """Return how many tokens may share a pass; 0 feeds every row alone."""
    return engine.token_budget if engine.is_ragged else 0


def _pass(engine: Engine, pairs: Sequence[tuple[int, Encoded]]) -> list[TokenScores]:
    owners = [adapter for adapter, _ in pairs]
    flat = lay_out([row for _, row in pairs], engine.base.device, owners)
    runs = segments(flat.lengths, [owner for owner, _ in groupby(owners)])
    engine.bank.route = Route(runs, runs)
    chunks = map(_of_chunk, _logits(engine, flat), torch.split(flat.targets_N, CHUNK))
    joined = [torch.cat(column) for column in zip(*chunks, strict=True)]
    rows_N = flat.rows_N.cpu()
    return [TokenScores(*(column[rows_N == number] for column in joined)) for number in range(len(pairs))]


def flat_inputs(flat: FlatRow) -> dict[str, object]:
    """Return what a model is called with for a flat row (`fedllm.models.attention`)."""
    return {
        "input_ids": flat.tokens_T[None],
        "position_ids": flat.positions_T[None],
        "cu_seq_lens_q": flat.queries_Q,
        "cu_seq_lens_k": flat.keys_Q,
        "max_length_q": flat.longest[0],
        "max_length_k": flat.longest[1],
        "key_places": flat.places_K,
        "use_cache": False,
    }


def _logits(engine: Engine, flat: FlatRow) -> Iterator[torch.Tensor]:
    """Yield the logits [N, V] of the learnt tokens, a chunk of tokens at a time."""
    model, inputs = engine.base.model, flat_inputs(flat)
    if not engine.has_plain_head:
        yield from model(**inputs, logits_to_keep=flat.predicting_N).logits[0].split(CHUNK)
        return
    head = model.get_output_embeddings()
    hidden_ND = model.get_decoder()(**inputs).last_hidden_state[0, flat.predicting_N]
    for part_ND in hidden_ND.split(CHUNK):
        yield linear(part_ND, head.weight, head.bias)


def _of_chunk(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    log_NV = logits_NV.to(precise(logits_NV.dtype)).log_softmax(dim=1)
    probs_NV = log_NV.exp()
    means_N = (probs_NV * log_NV).sum(dim=1)
    deviations_N = (probs_NV * (log_NV - means_N[:, None]).square()).sum(dim=1).sqrt()
    chosen_N = log_NV.gather(1, targets_N[:, None])[:, 0]
    numbers = (chosen_N, means_N, deviations_N)
    return (*(column.double().cpu() for column in numbers), (log_NV.argmax(dim=1) == targets_N).cpu())


def part_of_text(scores: TokenScores, begin: int, end: int | None = None) -> TokenScores:
    """Return the scores of the learnt tokens from `begin` to before `end`."""
    return TokenScores(*(getattr(scores, item.name)[begin:end] for item in fields(scores)))
