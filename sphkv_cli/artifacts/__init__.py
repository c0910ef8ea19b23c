"""The files between the stages: their format (FORMAT.md), and one load/save pair for each."""
