"""`python -m atp_edge`: the command line, as torchrun and accelerate start a module."""

from atp_edge.cli import main

main()
