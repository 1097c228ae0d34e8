"""What travels: the packet codec and its Flower records."""
