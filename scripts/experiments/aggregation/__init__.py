"""Experiment: aggregation rules compared, with attackers and without."""
