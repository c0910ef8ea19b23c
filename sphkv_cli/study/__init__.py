"""Studies: the questions behind the codes, each one command with tables, figures, a reading."""
