"""The training core and the command line."""
