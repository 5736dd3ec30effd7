"""What `atp-edge bench` measures: latency, memory, training, kernels, quality, peers.

A file of figures in bench/results/ has its command in the README there.
"""
