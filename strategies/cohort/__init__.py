"""Which clients a round asks, and how late updates count."""
