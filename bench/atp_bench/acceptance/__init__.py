"""The one command for a machine with a GPU: what is right, how fast it is, what it takes.

`bench/gpu_acceptance.py` runs it. A section is a file; each runs in a process of its own, with an
alarm and a JSON file of its own, so that one that fails or hangs takes nothing from the others.
`sizes.Sizes` holds what is real and what is a toy: every section runs on a CPU at toy size too.
"""
