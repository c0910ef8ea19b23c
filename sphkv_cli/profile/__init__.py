"""profile: what a plan costs in error and bytes, and on a GPU in time."""
