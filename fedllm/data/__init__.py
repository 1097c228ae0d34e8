"""Private text: sources, fields, partitions and the default corpus."""
