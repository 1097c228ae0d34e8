"""Taking what a client or a row has taught out of what a run has learnt."""
