"""Other people's ways to train what fedllm trains, one file each, for `scripts/benchmarks/client.py`."""
