"""A round's updates, one by one, become the next adapter: `init`, `add`, `finish`.

`add` turns an update into the change of one canonical adapter: at the rank of the run, with the client's own
scale folded into B. `finish` weighs the clients (`robust`), forms the mean of their products (`sums`), reads
it out (`readouts`) and lets the server optimizer step (`optimizers`). It reports

    rho          ||R||_F / ||M - M_0||_F: the error of averaging factors, as a share of the round's change
    kept energy  1 - ||M - what was read out||_F^2 / ||M||_F^2, at least 0
    delta norm   scale * ||M - M_0||_F

over all matrices together. The order of arrival decides the bits, so callers fix it.
Tensor suffixes: K clients, P flat adapter, L matrices of one shape, R rank, O output, I input feature.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch

from fedllm.adapters.algebra import Product, squared_norm
from fedllm.adapters.base_delta import BaseDelta
from fedllm.adapters.layout import AdapterLayout, AdapterState, with_rank
from fedllm.adapters.parts import returned_part
from fedllm.adapters.shapes import chunks_of, put_factors, shape_groups
from fedllm.errors import LayoutError
from fedllm.messages import ClientUpdate
from fedllm.plan.aggregation import COORDINATE_RULES, AggregationRule
from fedllm.runs.checkpoint import ServerState
from fedllm.runs.records import OptimizerState
from strategies.aggregation import optimizers, robust, sums
from strategies.aggregation.optimizers import aligned
from strategies.aggregation.readouts import READ_OUTS, Mean, ReadOut, factor_mean
from strategies.aggregation.sums import Change, Held, Sums

Outside: TypeAlias = Callable[[AdapterState, Sequence[Held]], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Mixture:
    """The updates of a round so far.

    `trained` is what its clients train: "both", "a" or "b". `fresh` draws the adapter of a restart. `outside`
    is a rule from elsewhere, from the start and the clients to the change [P] of the factors (`stock`).
    """

    rule: AggregationRule
    state: ServerState
    trained: str
    fresh: Callable[[], AdapterState]
    outside: Outside | None = None
    held: tuple[Held, ...] = ()
    folded: Sums | None = None

    @property
    def layout(self) -> AdapterLayout:
        """The run's layout."""
        return self.state.adapter.layout


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round changes at the server, and what it measured.

    Under read-out local-b the server knows no product: `rho` and `kept_energy` are None and `delta_norm` is
    the Frobenius norm of A's change. Sums of nodes and outside rules leave the first two unknown as well.
    """

    adapter: AdapterState
    base_delta: BaseDelta
    optimizer: OptimizerState
    norms: tuple[float, ...]  # median norms of the last rounds, for robust rules
    rho: float | None
    largest_rho: float | None  # of the worst single matrix
    kept_energy: float | None
    delta_norm: float
    silenced: tuple[str, ...] = ()


def init(
    rule: AggregationRule,
    state: ServerState,
    *,
    trained: str,
    fresh: Callable[[], AdapterState],
    outside: Outside | None = None,
) -> Mixture:
    """Return the empty mixture of the round that follows `state`."""
    return Mixture(rule, state, trained, fresh, outside)


def add(mixture: Mixture, update: ClientUpdate, scale: float | None = None) -> Mixture:
    """Return the mixture with one more client; `scale` is the client's own alpha / rank, else the run's.

    The weight is taken as it is: a late update comes discounted (`strategies.cohort.late_updates`).

    Raises:
        LayoutError: the delta is no adapter of the layout at a rank from 1 to the run's.
    """
    rule, layout = mixture.rule, mixture.layout
    rank = rank_of(layout, update.delta)
    delta_P = _canonical(mixture, update.delta, rank, layout.scale if scale is None else scale)
    weight = update.weight
    if rule.weighting == "product-norm":
        weight *= product_norm(layout, mixture.state.adapter.vector + delta_P)
    held = (*mixture.held, Held(update.client_id, weight, rank, delta_P))
    if (
        rule.holds_updates
        or mixture.outside
        or len(held) <= sums.most_held(layout, with_products=rule.needs_products)
    ):
        return replace(mixture, held=held)
    return _folded(replace(mixture, held=held))


def finish(mixture: Mixture) -> Aggregate:
    """Return the aggregate of at least one client."""
    if mixture.folded is not None and mixture.held:
        mixture = _folded(mixture)
    rule, layout, state = mixture.rule, mixture.layout, mixture.state
    verdict, norms = _weigh(mixture)
    # One client's own factors are already its exact read-out; refactoring them would only change the gauge.
    # Not where a robust rule may shrink its change: a part of a product is not the product of parts.
    is_single = mixture.folded is None and len(mixture.held) == 1 and rule.robust == "none"
    read_out = factor_mean if is_single and rule.read_out != "stack" else READ_OUTS[rule.read_out]
    vector_P, base_delta, measured = _read_out(mixture, verdict, read_out)
    moments = state.optimizer
    if not rule.optimizer.is_plain:
        target_P = vector_P
        if rule.read_out == "svd" and not is_single:
            target_P = aligned(layout, vector_P, state.adapter.vector)
        moments, step_P = optimizers.step(
            rule.optimizer, moments, target_P - state.adapter.vector, part_mask(layout, _shared_part(mixture))
        )
        vector_P = state.adapter.vector + step_P
    if rule.local_b:
        moved = float(torch.linalg.vector_norm(vector_P - state.adapter.vector))
        measured = _Measured(None, None, None, moved)
    elif (rule.node_sum and rule.train == "both") or mixture.outside:  # the mean of the products is not known
        measured = replace(measured, rho=None, largest_rho=None, kept_energy=None)
    return Aggregate(
        AdapterState(layout, vector_P).checked_finite(),
        base_delta.checked_finite(),
        moments,
        norms,
        measured.rho,
        measured.largest_rho,
        measured.kept_energy,
        measured.delta_norm,
        _silenced(mixture, verdict),
    )


def rank_of(layout: AdapterLayout, delta: torch.Tensor) -> int:
    """Return the rank of a flat adapter of the layout's matrices.

    Raises:
        LayoutError: no rank from 1 to the layout's has that size.
    """
    rank, rest = divmod(delta.numel(), layout.size // layout.rank)
    if rest or not 1 <= rank <= layout.rank:
        raise LayoutError(
            f"an update of {delta.numel()} values is no adapter of rank 1 to {layout.rank} of this run"
        )
    return rank


def part_mask(layout: AdapterLayout, part: str) -> torch.Tensor:
    """Return which values [P] belong to a part: "both", "a" or "b"."""
    mask_P = torch.ones(layout.size, dtype=torch.bool)
    for a_RI, b_OR in layout.factors(mask_P):
        a_RI[:], b_OR[:] = part != "b", part != "a"
    return mask_P


def product_norm(layout: AdapterLayout, vector_P: torch.Tensor) -> float:
    """Return ||B A||_F over all matrices, above zero: what HetLoRA weighs clients by."""
    total = 0.0
    for group in shape_groups(layout):
        factors = sums.change_of_vector(layout, vector_P, group.indices)
        total += float(squared_norm(Product(factors.b_LOR, factors.a_LRI)).sum())
    return max(math.sqrt(max(total, 0.0)), torch.finfo(torch.float32).tiny)


def _shared_part(mixture: Mixture) -> str:
    """Return the part of the adapter that this round's clients share with the server."""
    return returned_part(mixture.trained, mixture.rule.local_b)


def _canonical(mixture: Mixture, delta: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Return the change [P] of the client's adapter at the run's rank and scale, as float32.

    Columns that the client does not have are zeros, as in its product. Where one factor is common to all,
    they are columns it did not change: the mean takes each column over the clients that train it.
    """
    layout, part = mixture.layout, _shared_part(mixture)
    start_P = mixture.state.adapter.vector
    if rank == layout.rank and scale == layout.scale:
        return delta if part == "both" else torch.where(part_mask(layout, part), delta, 0.0)
    own = replace(layout, rank=rank, alpha=layout.scale * rank)
    adapter = with_rank(start_P, layout, rank).double() + delta
    for _, b_OR in own.factors(adapter):
        b_OR *= scale / layout.scale
    delta_P = with_rank(adapter, own, layout.rank) - start_P
    if part == "both":
        return delta_P.float()
    for a_RI, b_OR in layout.factors(delta_P):
        a_RI[rank:], b_OR[:, rank:] = 0.0, 0.0
    return torch.where(part_mask(layout, part), delta_P, 0.0).float()


def _folded(mixture: Mixture) -> Mixture:
    layout, products = mixture.layout, mixture.rule.needs_products
    before = mixture.folded or sums.empty_sums(layout, with_products=products)
    return replace(mixture, held=(), folded=sums.fold(before, layout, mixture.held))


def _weigh(mixture: Mixture) -> tuple[robust.Verdict, tuple[float, ...]]:
    """Return what the held clients are left with, and the norms that robust rules remember."""
    rule, norms = mixture.rule, mixture.state.norms
    weights_K = torch.tensor([client.weight for client in mixture.held], dtype=torch.float64)
    p_K = weights_K / weights_K.sum()
    if rule.robust == "none" or rule.robust in COORDINATE_RULES:
        return robust.Verdict(p_K, torch.ones_like(p_K)), norms
    deltas = [client.delta for client in mixture.held]
    grams_KK = robust.change_grams(mixture.layout, mixture.state.adapter.vector, deltas)
    verdict = robust.judge(rule.robust, grams_KK, p_K, max_malicious=rule.max_malicious, norms=norms)
    return verdict, robust.next_norms(norms, grams_KK)


def _silenced(mixture: Mixture, verdict: robust.Verdict) -> tuple[str, ...]:
    total = sum(client.weight for client in mixture.held)
    return tuple(
        client.client_id
        for client, left in zip(mixture.held, verdict.coefficients.tolist(), strict=True)
        if left < robust.SILENT_SHARE * client.weight / total
    )


@dataclass(frozen=True)
class _Measured:
    rho: float | None
    largest_rho: float | None
    kept_energy: float | None
    delta_norm: float


def _read_out(
    mixture: Mixture, verdict: robust.Verdict, read_out: Callable[[Mean], ReadOut]
) -> tuple[torch.Tensor, BaseDelta, _Measured]:
    """Return the next adapter [P], the next base delta and what was measured, shape by shape."""
    layout, base_delta, start_P = mixture.layout, mixture.state.base_delta, mixture.state.adapter.vector
    vector_P, energies = torch.empty(layout.size), []
    for place, part, change in _changes(mixture, verdict):
        indices = shape_groups(layout)[place].indices[part]
        start = sums.change_of_vector(layout, start_P, indices)
        mean = Mean(start.a_LRI, start.b_LOR, change)
        result = read_out(mean)
        put_factors(layout, vector_P, indices, result.a_LRI, result.b_LOR)
        if result.base is not None:
            base_delta = base_delta.plus(dict(zip(indices, result.base.split(), strict=True)))
        energies.append(
            torch.stack([mean.residual_energy_L, mean.change_energy_L, result.lost_L, mean.energy_L])
        )
    if mixture.rule.read_out == "stack":
        vector_P = mixture.fresh().vector
    return vector_P, base_delta, _measure(torch.cat(energies, dim=1), layout.scale)


def _changes(mixture: Mixture, verdict: robust.Verdict) -> Iterator[tuple[int, slice, Change]]:
    """Yield the mean change of every part of every shape group: its place, the part, the change."""
    rule, layout, held = mixture.rule, mixture.layout, mixture.held
    delta_P = None
    if mixture.outside:
        mask_P = part_mask(layout, _shared_part(mixture))
        delta_P = torch.where(mask_P, mixture.outside(mixture.state.adapter, held), 0.0)
    elif rule.robust in COORDINATE_RULES:
        delta_P = robust.of_coordinates(rule.robust, [client.delta for client in held], rule.max_malicious)
    shares_R = sums.rank_weights(held, verdict.weights, layout.rank)
    for place, group in enumerate(shape_groups(layout)):
        for part in chunks_of(group, sums.matrices_at_once(group, layout.rank * (len(held) + 2))):
            indices = group.indices[part]
            if delta_P is not None:
                yield place, part, sums.change_of_vector(layout, delta_P, indices)
            elif mixture.folded is not None:
                yield place, part, sums.change_of_sums(mixture.folded, layout, place, part)
            else:
                change = sums.change_of_held(
                    layout, held, verdict.coefficients, indices, with_residual=rule.needs_products
                )
                yield place, part, change if rule.needs_products else change.per_column(shares_R)


def _measure(energies: torch.Tensor, scale: float) -> _Measured:
    """Return the numbers of a round from the energies [4, matrices] of R, change, loss and M."""
    residual, change, lost, total = energies.sum(dim=1).tolist()
    worst = (energies[0] / energies[1])[energies[1] > 0]
    return _Measured(
        math.sqrt(residual / change) if change else 0.0,
        math.sqrt(float(worst.max())) if len(worst) else 0.0,
        max(0.0, 1 - lost / total) if total else 1.0,
        math.sqrt(change) * scale,
    )
