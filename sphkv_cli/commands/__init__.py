"""One module per command of the command line; importing one registers its command."""
