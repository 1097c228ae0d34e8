"""What a run will do: its configuration resolved once into numbers and rules."""
