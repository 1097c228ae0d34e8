"""Differential privacy: one plan owns the whole guarantee; clipping, noise, accounting and words are its parts."""
