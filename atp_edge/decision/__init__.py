"""The pruning decision: budget, projection, generator, scores, regularizer."""
