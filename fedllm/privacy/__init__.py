"""Differential privacy: clipping and noise, the secrets noise is derived from, accounting and the ledger."""
