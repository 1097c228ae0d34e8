"""Robust rules: how much each client counts when some of them may lie.

Factors have no distance: (B_i G, G^-1 A_i) is the same client for any G. So the rules measure changes of the
product, D_i = s_i B_i A_i - B_0 A_0 over all matrices together, and every number they need stands in the
K x K Gram matrix of the D_i (`change_grams`). They answer with a coefficient a_i for every client; the
aggregate is the start plus sum a_i D_i, read out like any mean. The plain mean is a_i = p_i.

    norm-clip          a_i = p_i min(1, bound / ||D_i||), bound = 2 x the running median of the norms
    multi-krum         the K - f clients with the closest neighbours (Blanchard et al., arXiv 1703.02757)
    geometric-median   argmin_D sum p_i ||D_i - D||, by Weiszfeld's steps (RFA, arXiv 1912.13445)
    similarity         clients whose change points with the geometric median, the rest silenced, norms clipped
                       (the cosine test of FLTrust, arXiv 2012.13995, without a data set at the server)

What is one client here is one site: all clients of a site count as their mean, with the sum of their weights
(`site_means`), so that no site gains by calling itself many clients.

Two more compare single coordinates. They make sense only where one factor is common to all
(`fedllm/plan/aggregation.py` refuses them elsewhere), and count every client alike: trimmed-mean leaves out
the f largest and smallest values, coordinate-median takes the middle one (Yin et al., arXiv 1803.01498). f is
the assumed share of malicious clients, rounded up.
Tensor suffixes: K clients, V sites (voices), S the start and the clients, P flat adapter, R rank, O output,
I input feature.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedllm.adapters.layout import AdapterLayout
from fedllm.adapters.shapes import shape_groups, stack_factors
from strategies.aggregation.devices import product_device

NORM_FACTOR = 2.0  # of the running median: no honest client is cut often, and none can do much more
NUM_MEDIANS = 8  # rounds whose median norm is remembered
SILENT_SHARE = 0.1  # a client left with less of its weight than this is named in the record
MOST_STEPS, SETTLED = 500, 1e-9  # of Weiszfeld's algorithm
COORDINATES_AT_ONCE = 1 << 20  # values of all clients that are sorted together


@dataclass(frozen=True, eq=False)
class ClientShares:
    """How much clients count: `weights` [K] sum to 1, and each change is scaled by `shrink` [K]."""

    weights: torch.Tensor
    shrink: torch.Tensor

    @property
    def coefficients(self) -> torch.Tensor:
        """The a_i [K] of start + sum a_i D_i."""
        return self.weights * self.shrink


def weigh_clients(
    rule: str, grams_KK: torch.Tensor, p_K: torch.Tensor, *, max_malicious: float, norms: Sequence[float]
) -> ClientShares:
    """Return how much clients of weights `p_K` (sum 1) count under a rule that needs the Gram matrix.

    `norms` are the median norms of earlier rounds (`remember_norms`), oldest first.
    """
    bound = NORM_FACTOR * statistics.median(remember_norms(norms, grams_KK))
    clip_K = (bound / _norms(grams_KK)).nan_to_num(nan=1.0).clamp(max=1.0)  # 0 / 0: nobody changed anything
    if rule == "norm-clip":
        return ClientShares(p_K, clip_K)
    if rule == "similarity":
        return ClientShares(similar_weights(grams_KK, p_K), clip_K)
    if rule == "multi-krum":
        weights_K = krum_weights(grams_KK, p_K, num_malicious(len(p_K), max_malicious))
    else:
        weights_K = geometric_median(grams_KK, p_K)
    return ClientShares(weights_K, torch.ones_like(p_K))


def site_means(sites: Sequence[str], p_K: torch.Tensor) -> torch.Tensor | None:
    """Return the matrix [V, K] that takes the mean over each site's clients by their weights `p_K`.

    `sites` names the site of every client; they are in the order in which they appear first. None where every
    client is a site: there is nothing to take the mean of.
    """
    names = list(dict.fromkeys(sites))
    if len(names) == len(sites):
        return None
    means_VK = torch.zeros(len(names), len(sites), dtype=torch.float64)
    for client, site in enumerate(sites):
        # Shares of 0 are of weights too small for a float64: their mean must still be a number.
        means_VK[names.index(site), client] = max(float(p_K[client]), torch.finfo(torch.float64).tiny)
    return means_VK / means_VK.sum(dim=1, keepdim=True)


def weigh_sites(
    rule: str,
    grams_KK: torch.Tensor,
    p_K: torch.Tensor,
    means_VK: torch.Tensor | None,
    *,
    max_malicious: float,
    norms: Sequence[float],
) -> tuple[ClientShares, tuple[float, ...]]:
    """Return how much clients count where every site has one voice, and the norms to remember."""
    if means_VK is None:
        shares = weigh_clients(rule, grams_KK, p_K, max_malicious=max_malicious, norms=norms)
        return shares, remember_norms(norms, grams_KK)
    grams_VV = means_VK @ grams_KK @ means_VK.T  # of the sites' mean products
    is_member_VK = (means_VK > 0).double()
    found = weigh_clients(rule, grams_VV, is_member_VK @ p_K, max_malicious=max_malicious, norms=norms)
    shares = ClientShares(found.weights @ means_VK, found.shrink @ is_member_VK)
    return shares, remember_norms(norms, grams_VV)


def remember_norms(norms: Sequence[float], grams_KK: torch.Tensor) -> tuple[float, ...]:
    """Return the median norms of the last rounds with this one's, all that a rule remembers."""
    return (*norms, float(_norms(grams_KK).median()))[-NUM_MEDIANS:]


def num_malicious(num_clients: int, share: float) -> int:
    """Return how many of a round's clients may lie: the assumed share rounded up, always a minority."""
    return min(math.ceil(share * num_clients - 1e-9), (num_clients - 1) // 2)


def change_grams(
    layout: AdapterLayout, start_P: torch.Tensor, deltas: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return <D_i, D_j> [K, K] in float64 of the deltas' changes, times the square of the layout's scale.

    No matrix is formed unless it is the smaller thing, and no two numbers larger than the changes cancel.
    """
    device = product_device(len(deltas) * layout.rank)
    total_KK = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=device)
    for group in shape_groups(layout):
        sides = group.out_features + group.in_features
        is_small = group.out_features * group.in_features < layout.rank**2 * sides
        for index in group.indices:
            a_LSRI, b_LOSR = stack_factors(layout, (start_P, *deltas), (index,), device)
            grams = _dense_grams if is_small else _factored_grams
            total_KK += grams(a_LSRI[0], b_LOSR[0].transpose(0, 1))
    return ((total_KK + total_KK.T) * (layout.scale**2 / 2)).cpu()


def _dense_grams(a_SRI: torch.Tensor, b_SOR: torch.Tensor) -> torch.Tensor:
    """Return <D_i, D_j> [K, K] from the changes D_i = B_0 a_i + b_i (A_0 + a_i) themselves.

    Place 0 of both stacks is the start, the others are the clients' changes a_i, b_i.
    """
    changes = (b_SOR[0] @ a_SRI[1:] + b_SOR[1:] @ (a_SRI[0] + a_SRI[1:])).flatten(1)
    return changes @ changes.T


def _factored_grams(a_SRI: torch.Tensor, b_SOR: torch.Tensor) -> torch.Tensor:
    """Return the same from R x R blocks, <B a, B' a'> = tr((a' a^T)(B^T B')) for both terms of D."""
    count, rank = len(a_SRI), a_SRI.shape[1]
    rows, columns = a_SRI.flatten(0, 1), b_SOR.mT.flatten(0, 1)
    rows_SRSR = (rows @ rows.T).view(count, rank, count, rank)
    columns_SRSR = (columns @ columns.T).view(count, rank, count, rank)
    change_KRKR = rows_SRSR[1:, :, 1:]  # a_i a_j^T
    from_start_KRKR = rows_SRSR[1:, :, :1]  # a_i A_0^T
    to_start_KRKR = rows_SRSR[:1, :, 1:]  # A_0 a_j^T
    mixed = columns_SRSR[:1, :, 1:] * (change_KRKR + from_start_KRKR)  # <B_0 a_i, b_j A_j>
    whole_KRKR = change_KRKR + from_start_KRKR + to_start_KRKR + rows_SRSR[:1, :, :1]  # A_i A_j^T
    ends = columns_SRSR[:1, :, :1] * change_KRKR + columns_SRSR[1:, :, 1:] * whole_KRKR
    mixed_KK = mixed.sum(dim=(1, 3))
    return ends.sum(dim=(1, 3)) + mixed_KK + mixed_KK.T


def _norms(grams_KK: torch.Tensor) -> torch.Tensor:
    return grams_KK.diagonal().clamp(min=0).sqrt()


def krum_weights(grams_KK: torch.Tensor, p_K: torch.Tensor, num_malicious: int) -> torch.Tensor:
    """Return weights [K] of the K - f clients whose K - f - 2 nearest neighbours are nearest; of others 0."""
    count, norms_K = len(p_K), grams_KK.diagonal()
    # ||D_i - D_j||^2 = G_ii + G_jj - 2 G_ij
    distances = (norms_K[:, None] + norms_K[None, :] - 2 * grams_KK).clamp(min=0)
    neighbours = max(1, count - num_malicious - 2)
    nearest = distances.sort(dim=1).values[:, 1 : neighbours + 1]  # the first is the client itself
    kept = nearest.sum(dim=1).argsort(stable=True)[: count - num_malicious]
    weights_K = torch.zeros_like(p_K)
    weights_K[kept] = p_K[kept]
    return weights_K / weights_K.sum()


def geometric_median(grams_KK: torch.Tensor, p_K: torch.Tensor) -> torch.Tensor:
    """Return coefficients a [K], sum 1, that minimise sum p_i ||D_i - sum_j a_j D_j||.

    ||D_i - D a||^2 = G_ii - 2 (G a)_i + a^T G a, so Weiszfeld's steps need the Gram matrix alone. Distances
    below a millionth of the median norm count as that, which is above the rounding of these sums: clients
    that agree are pulled at alike.
    """
    a_K, norms_K = p_K, grams_KK.diagonal()
    least = max(1e-6 * math.sqrt(max(float(norms_K.median()), 0.0)), torch.finfo(torch.float64).tiny)
    for _ in range(MOST_STEPS):
        along_K = grams_KK @ a_K
        distances_K = (norms_K - 2 * along_K + a_K @ along_K).clamp(min=0).sqrt()
        pulls_K = p_K / distances_K.clamp(min=least)
        moved_K = pulls_K / pulls_K.sum()
        change, a_K = float((moved_K - a_K).abs().sum()), moved_K
        if change < SETTLED:
            break
    return a_K


def similar_weights(grams_KK: torch.Tensor, p_K: torch.Tensor) -> torch.Tensor:
    """Return weights [K] without those clients who point away from the geometric median."""
    towards_K = grams_KK @ geometric_median(grams_KK, p_K)  # <D_i, median>
    weights_K = torch.where(towards_K > 0, p_K, 0.0)
    if float(weights_K.sum()) == 0:  # nobody changed anything
        weights_K = p_K
    return weights_K / weights_K.sum()


def combine_coordinates(
    rule: str, deltas: Sequence[torch.Tensor], max_malicious: float, means_VK: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the trimmed mean or the median [P], in float64, of every coordinate of the sites' means."""
    number = len(deltas) if means_VK is None else len(means_VK)
    cut = (number - 1) // 2 if rule == "coordinate-median" else num_malicious(number, max_malicious)
    width = max(1, COORDINATES_AT_ONCE // len(deltas))
    pieces = []
    for begin in range(0, len(deltas[0]), width):
        values = torch.stack([delta[begin : begin + width] for delta in deltas]).double()
        if means_VK is not None:
            values = means_VK @ values
        pieces.append(values.sort(dim=0).values[cut : number - cut].mean(dim=0))
    return torch.cat(pieces)
