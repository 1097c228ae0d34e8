"""Distillation: the ensemble of client adapters taught back into one adapter."""
