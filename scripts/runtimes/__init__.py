"""Where a run's clients execute: this process, or Flower's processes."""
