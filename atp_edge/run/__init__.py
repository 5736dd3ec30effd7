"""A run's folder: files, locks, history, progress, errors, environment."""
