"""Sums of which nobody sees a part: a ring, key agreement, shares, and the masks of a round.

Numpy and `cryptography` only. Each construction is a well-known one; how they are put together has been
reviewed by no cryptographer.
"""
