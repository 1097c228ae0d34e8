"""Studies: the same rows with and without a federation, method by method, and what joining brought."""
