"""What `fedllm audit` measures: one attack a module, each with its controls."""
