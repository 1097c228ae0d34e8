"""Everything a GPU is for, measured in one go: training steps, clients, rounds, runs, generation."""
