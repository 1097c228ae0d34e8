"""Whether synthetic text is new: overlap with private text, near duplicates, a verdict for every text."""
