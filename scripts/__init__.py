"""What a person runs: the `fedllm` command, benchmarks and experiments."""
