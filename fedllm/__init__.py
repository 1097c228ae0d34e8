"""Federated fine-tuning of foundation models on Flower."""
