"""The command line of sphkv: models, files, the terminal and the clock."""
