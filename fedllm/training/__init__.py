"""Local training: the engine, its plain twin, loss and evaluation."""
