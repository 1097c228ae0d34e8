"""Unlearning a client of a finished run whose rows are on this machine, and measuring what is left of it."""
