"""The step that teaches the clients' adapters back into the aggregated one, at the end of a round."""
