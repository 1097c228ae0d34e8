"""Differential privacy: one plan owns the guarantee; clipping, noise, accounting and words serve it."""
