"""The run's models against other engines, at what was asked and what was measured."""
