"""Closed-form steps: repair, teacher match, rotation of the values."""
