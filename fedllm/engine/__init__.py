"""Training, evaluating and sampling with many adapters at once on one frozen base model."""
