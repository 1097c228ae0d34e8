"""What the benchmark commands share: timing, plots, models, rows, and other people's ways to do the same."""
