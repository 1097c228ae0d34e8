"""Signed adapters: who vouches for which files, and how they came about."""
