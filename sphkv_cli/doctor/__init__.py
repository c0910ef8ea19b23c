"""What this environment can run, what it lacks, and the command that mends it."""
