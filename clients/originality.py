"""How much of the server's synthetic texts occurs in this node's private text: counts, and no more.

A count is an oracle, so it is kept coarse and rare: in steps of a fifth, the most over all of the node's
clients, of texts that are not short, for a bounded number of them, at most once in every round of the run and
never twice for one. A site.toml bounds it further (`clients.gate`): only where the run has synthetic text to
screen, as often as the node has trained in it, and so often in a period over all runs. It is an oracle all
the same: a server that guesses more than a fifth of a long text's shingles learns whether the node has them,
and cannot be told from one that asks about its own texts.
"""

from clients.data_holder import DataHolder
from fedllm.errors import QueryLimitError, WithheldError
from fedllm.originality.overlap import Overlap, OverlapRequest, coarse, most, overlaps, private_hashes


def check_limit(request: OverlapRequest, last_round: int, num_rounds: int) -> None:
    """Allow one query a round: every query is of a later round than the last, and of a round the run has.

    Raises:
        QueryLimitError: it is not.
    """
    if not last_round < request.round_num <= num_rounds:
        raise QueryLimitError(
            f"refused a second or late overlap query (round {request.round_num}, the last was {last_round},"
            f" the run has {num_rounds}): one may be asked in each round"
        )


def answer_overlap(holder: DataHolder, request: OverlapRequest) -> tuple[Overlap, ...]:
    """Return for every text the most that any client of this node has of it, in all rows it keeps.

    Raises:
        WithheldError: the run has a privacy plan, and a count is a number that nothing noises.
    """
    if holder.plan.privacy is not None:  # the accounting knows of no such release
        raise WithheldError("privacy.epsilon is set: counts of private text stay with the clients")
    answers = []
    for client in holder.clients.values():
        rows = (row.tokens for row in (*client.train, *client.held_out))
        answers.append(overlaps(request.probes, private_hashes(rows, request.salt)))
    # A node without clients answers as one whose rows hold none of it.
    found = most(answers) if answers else overlaps(request.probes, private_hashes((), request.salt))
    return tuple(map(coarse, found))
