"""Messages over a Flower grid, and what each node holds already."""
