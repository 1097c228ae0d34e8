"""Forgetting a client, or rows of one, after a run: how surely, and by which work."""
