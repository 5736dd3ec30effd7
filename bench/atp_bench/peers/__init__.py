"""The run's models against other engines, with the targets and what was measured."""
