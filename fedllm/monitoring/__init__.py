"""Watching an adapter in use: whether clients' losses drift, and figures for Prometheus."""
