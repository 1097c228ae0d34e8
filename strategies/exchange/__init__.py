"""What the server asks of nodes and what it accepts of their answers."""
