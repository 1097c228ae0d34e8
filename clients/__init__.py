"""What runs on a data holder's machine: the ClientApp, local training, and what protects an update."""
