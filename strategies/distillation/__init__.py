"""The step that teaches the clients' adapters back into the aggregated one, beside the round loop."""
