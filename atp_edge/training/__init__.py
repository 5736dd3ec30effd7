"""Learners, phases and the loop that drives them."""
