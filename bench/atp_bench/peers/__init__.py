"""Rivals measured beside the product."""
