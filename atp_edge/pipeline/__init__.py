"""The stages of a run in their order, what it will cost, and what it shows."""
