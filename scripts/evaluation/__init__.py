"""What `fedllm evaluate` measures, one module for each kind of table."""
