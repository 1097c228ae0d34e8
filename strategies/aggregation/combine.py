"""A round's updates, one by one, become the next adapter: `RoundUpdates`, `add`, `finish`.

`add` turns an update into the change of one canonical adapter: at the rank of the run, with the client's own
scale folded into B. `finish` weighs the clients (`robust`), forms the mean of their products (`sums`), reads
it out (`readouts`) and lets the server optimizer step (`optimizers`). With R the residual of the mean M of
the products (`sums`) and M_0 the product that the round started from, it measures

    rho          ||R||_F / ||M - M_0||_F: the error of averaging factors, as a share of the round's change
    kept energy  1 - ||M - what was read out||_F^2 / ||M||_F^2, at least 0
    delta norm   scale * ||M - M_0||_F

over all matrices together. The order of arrival decides the bits, so callers fix it.
Tensor suffixes: K clients, P flat adapter, L matrices of one shape, R rank, O output, I input feature.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from fedllm.runs.records import AggregationRecord, OptimizerState
from strategies.aggregation import optimizers, robust, sums
from strategies.aggregation.readouts import READ_OUTS, Mean, ReadOut, factor_mean
from strategies.aggregation.sums import FoldedSums, HeldUpdate, MeanChange

StockRule: TypeAlias = Callable[[AdapterState, Sequence[HeldUpdate]], torch.Tensor]


@dataclass(frozen=True, eq=False)
class RoundUpdates:
    """The updates of a round so far: the latest as they came (`held`), the earlier ones as sums (`folded`).

    `trained` is what clients train: "both", "a" or "b". `fresh` draws the adapter of a restart. `stock_rule`
    maps the start and the clients to the change [P] of the factors, in place of our own mean (`stock`).
    `voices` names the site of clients that do not speak for themselves alone.
    `keep` finds room for changes of which all must be held to the end (`strategies.memory`).
    """

    rule: AggregationRule
    state: ServerState
    trained: str
    fresh: Callable[[], AdapterState]
    stock_rule: StockRule | None = None
    keep: Callable[[torch.Tensor], torch.Tensor] = lambda delta_P: delta_P
    voices: Mapping[str, str] = field(default_factory=dict)
    held: tuple[HeldUpdate, ...] = ()
    folded: FoldedSums | None = None

    @property
    def layout(self) -> AdapterLayout:
        """The run's layout."""
        return self.state.adapter.layout

    @property
    def sites(self) -> list[str]:
        """The site of every held update; a client of none is one itself."""
        return [self.voices.get(client.client_id, client.client_id) for client in self.held]

    @property
    def is_empty(self) -> bool:
        """Whether no update has come."""
        return not self.held and self.folded is None

    @property
    def shared_part(self) -> str:
        """The part of the adapter that this round's clients send: "both", "a" or "b"."""
        return returned_part(self.trained, self.rule.local_b)

    @property
    def num_holdable(self) -> int | None:
        """How many updates may be held before they are folded into sums; None if all must be."""
        if self.rule.holds_updates or self.stock_rule:
            return None
        return sums.num_holdable(self.layout, with_products=self.rule.needs_products)

    @property
    def keeps_own_factors(self) -> bool:
        """Whether the only client's factors are the read-out: refactoring them would only change the basis.

        Not where a robust rule may shrink its change: a part of a product is not the product of parts.
        """
        is_single = self.folded is None and len(self.held) == 1
        return is_single and self.rule.robust == "none" and self.rule.read_out != "stack"


@dataclass(frozen=True, eq=False)
class Aggregate:
    """What a round changes at the server, and what it measured.

    Under read-out local-b the server knows no product: then only the norm of A's change is measured. Sums of
    nodes and stock rules leave rho and the kept energy unknown as well.
    """

    adapter: AdapterState
    base_delta: BaseDelta
    optimizer: OptimizerState
    norms: tuple[float, ...]  # median norms of the last rounds, for robust rules
    measured: AggregationRecord


def add(updates: RoundUpdates, update: ClientUpdate, scale: float | None = None) -> RoundUpdates:
    """Return the updates with one more; `scale` is the client's own alpha / rank, else the run's.

    The weight is taken as it is: a late update comes discounted (`strategies.cohort.late_updates`).

    Raises:
        LayoutError: the delta is no adapter of the layout at a rank from 1 to the run's.
    """
    layout = updates.layout
    rank = rank_of(layout, update.delta)
    delta_P = _canonical(updates, update.delta, rank, layout.scale if scale is None else scale)
    weight = update.weight
    if updates.rule.weighting == "product-norm":
        weight *= product_norm(layout, updates.state.adapter.vector + delta_P)
    most = updates.num_holdable
    delta_P = updates.keep(delta_P) if most is None else delta_P
    updates = replace(updates, held=(*updates.held, HeldUpdate(update.client_id, weight, rank, delta_P)))
    return updates if most is None or len(updates.held) <= most else _fold(updates)


def finish(updates: RoundUpdates) -> Aggregate:
    """Return the aggregate of at least one client."""
    if updates.folded is not None and updates.held:
        updates = _fold(updates)
    rule, layout, state = updates.rule, updates.layout, updates.state
    shares, norms = _weigh(updates)
    read_out = factor_mean if updates.keeps_own_factors else READ_OUTS[rule.read_out]
    vector_P, base_delta, measured = _read_out(updates, shares, read_out)
    start_P, optimizer = state.adapter.vector, state.optimizer
    if not rule.optimizer.is_plain:
        target_P = vector_P
        if rule.read_out == "svd" and not updates.keeps_own_factors:
            target_P = optimizers.rewrite_in_basis(layout, vector_P, start_P)
        mask_P = part_mask(layout, updates.shared_part)
        optimizer, step_P = optimizers.step(rule.optimizer, optimizer, target_P - start_P, mask_P)
        vector_P = start_P + step_P
    if rule.local_b:
        measured = AggregationRecord(delta_norm=float(torch.linalg.vector_norm(vector_P - start_P)))
    elif (rule.node_sum and rule.train == "both") or updates.stock_rule:
        # The mean of the products is not known, so neither is what was lost of it.
        measured = replace(measured, rho=None, largest_rho=None, kept_energy=None)
    return Aggregate(
        AdapterState(layout, vector_P).checked_finite(),
        base_delta.checked_finite(),
        optimizer,
        norms,
        replace(measured, silenced=_silenced(updates, shares)),
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
    # A client whose product is zero, as all are before round 1, must keep a weight: they may all be so.
    return max(math.sqrt(max(total, 0.0)), torch.finfo(torch.float32).tiny)


def _canonical(updates: RoundUpdates, delta: torch.Tensor, rank: int, scale: float) -> torch.Tensor:
    """Return the change [P] of the client's adapter at the run's rank and scale, as float32.

    Columns that the client does not have are zeros, as in its product. Where one factor is common to all,
    they are columns it did not change: the mean takes each column over the clients that train it.
    """
    layout, part = updates.layout, updates.shared_part
    start_P = updates.state.adapter.vector
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


def _fold(updates: RoundUpdates) -> RoundUpdates:
    layout, products = updates.layout, updates.rule.needs_products
    before = updates.folded or sums.empty_sums(layout, with_products=products)
    return replace(updates, held=(), folded=sums.fold(before, layout, updates.held))


def _weigh(updates: RoundUpdates) -> tuple[robust.ClientShares, tuple[float, ...]]:
    """Return what the held clients are left with, and the norms that robust rules remember."""
    rule, norms = updates.rule, updates.state.norms
    weights_K = torch.tensor([client.weight for client in updates.held], dtype=torch.float64)
    p_K = weights_K / weights_K.sum()
    if rule.robust == "none" or rule.robust in COORDINATE_RULES:
        return robust.ClientShares(p_K, torch.ones_like(p_K)), norms
    deltas = [client.delta for client in updates.held]
    grams_KK = robust.change_grams(updates.layout, updates.state.adapter.vector, deltas)
    means_VK = robust.site_means(updates.sites, p_K)
    return robust.weigh_sites(
        rule.robust, grams_KK, p_K, means_VK, max_malicious=rule.max_malicious, norms=norms
    )


def _silenced(updates: RoundUpdates, shares: robust.ClientShares) -> tuple[str, ...]:
    total = sum(client.weight for client in updates.held)
    return tuple(
        client.client_id
        for client, left in zip(updates.held, shares.coefficients.tolist(), strict=True)
        if left < robust.SILENT_SHARE * client.weight / total
    )


def _read_out(
    updates: RoundUpdates, shares: robust.ClientShares, read_out: Callable[[Mean], ReadOut]
) -> tuple[torch.Tensor, BaseDelta, AggregationRecord]:
    """Return the next adapter [P], the next base delta and what was measured, shape by shape."""
    layout, base_delta, start_P = updates.layout, updates.state.base_delta, updates.state.adapter.vector
    vector_P, energies = torch.empty(layout.size), []
    for indices, change in _mean_changes(updates, shares):
        start = sums.change_of_vector(layout, start_P, indices)
        mean = Mean(start.a_LRI, start.b_LOR, change)
        result = read_out(mean)
        put_factors(layout, vector_P, indices, result.a_LRI, result.b_LOR)
        if result.base is not None:
            base_delta = base_delta.plus(dict(zip(indices, result.base.split(), strict=True)))
        energies.append(
            torch.stack([mean.residual_energy_L, mean.change_energy_L, result.lost_L, mean.energy_L])
        )
    if updates.rule.read_out == "stack":  # all that was learnt is in the base now
        vector_P = updates.fresh().vector
    return vector_P, base_delta, _measure(torch.cat(energies, dim=1), layout.scale)


def _mean_changes(
    updates: RoundUpdates, shares: robust.ClientShares
) -> Iterator[tuple[tuple[int, ...], MeanChange]]:
    """Yield matrices of one shape, as many as fit the workspace, and the clients' mean change of them."""
    rule, layout, held = updates.rule, updates.layout, updates.held
    delta_P = None  # the change itself, from rules that are no weighted mean
    if updates.stock_rule:
        mask_P = part_mask(layout, updates.shared_part)
        delta_P = torch.where(mask_P, updates.stock_rule(updates.state.adapter, held), 0.0)
    elif rule.robust in COORDINATE_RULES:
        deltas = [client.delta for client in held]
        means_VK = robust.site_means(updates.sites, shares.weights)
        delta_P = robust.combine_coordinates(rule.robust, deltas, rule.max_malicious, means_VK)
    shares_R = sums.rank_weights(held, shares.weights, layout.rank)
    for place, group in enumerate(shape_groups(layout)):
        for part in chunks_of(group, sums.matrices_at_once(group, layout.rank * (len(held) + 2))):
            indices = group.indices[part]
            if delta_P is not None:
                change = sums.change_of_vector(layout, delta_P, indices)
            elif updates.folded is not None:
                change = sums.change_of_sums(updates.folded, layout, place, part)
            else:
                change = sums.change_of_held(
                    layout, held, shares.coefficients, indices, with_residual=rule.needs_products
                )
                change = change if rule.needs_products else change.per_column(shares_R)
            yield indices, change


def _measure(energies: torch.Tensor, scale: float) -> AggregationRecord:
    """Return the numbers of a round from the energies [4, matrices] of R, M - M_0, the loss and M."""
    residual, change, lost, total = energies.sum(dim=1).tolist()
    worst = (energies[0] / energies[1])[energies[1] > 0]  # matrices that nobody changed have no rho
    return AggregationRecord(
        delta_norm=math.sqrt(change) * scale,
        rho=math.sqrt(residual / change) if change else 0.0,
        largest_rho=math.sqrt(float(worst.max())) if len(worst) else 0.0,
        kept_energy=max(0.0, 1 - lost / total) if total else 1.0,
    )
