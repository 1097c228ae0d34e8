"""What runs beside private data: the ClientApp and what protects an update."""
