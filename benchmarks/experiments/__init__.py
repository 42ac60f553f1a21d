"""The questions that the paper and its readers ask, each a command that writes a table."""
