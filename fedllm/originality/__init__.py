"""Whether synthetic text is new: overlap, near duplicates, distance, membership, memorisation."""
