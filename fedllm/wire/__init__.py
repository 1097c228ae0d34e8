"""What travels between server and nodes: packets, and values as Flower records."""
