"""Layers and operators, forward and backward, against their rivals."""
