"""Layouts of an exported folder that others load by default."""
