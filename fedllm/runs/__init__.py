"""What a run leaves behind: records, checkpoints and the run folder."""
