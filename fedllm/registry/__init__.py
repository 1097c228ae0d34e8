"""The registry: numbered, signed versions of one model, and which of them is in use."""
