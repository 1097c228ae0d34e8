"""Experiments: what the methods do to a model, on text that is at hand, seeded and resumable."""
