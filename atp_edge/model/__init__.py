"""Decoders: families, structures, plans, and the narrow model with its checkpoint."""
