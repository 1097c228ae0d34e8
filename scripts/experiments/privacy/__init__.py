"""Experiment: what privacy costs and hides."""
