"""Base models: loading, fingerprints, LoRA layers and chat encoding."""
