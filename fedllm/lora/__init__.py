"""LoRA for many adapters at once: the bank of parameters, the operator, the layers."""
