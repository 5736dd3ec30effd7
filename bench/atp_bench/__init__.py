"""Latency, memory and training benchmarks."""
