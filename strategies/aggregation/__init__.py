"""Client updates become one adapter: sums, robust rules, read-outs, server optimizers."""
