"""The keys of a run: their defaults, ranges and meaning, and how a recipe writes them."""
