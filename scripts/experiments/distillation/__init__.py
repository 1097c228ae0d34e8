"""Experiment: what a distillation step gives back."""
