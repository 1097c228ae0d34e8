"""Tasks that say what a model can do, and how sure that is."""
