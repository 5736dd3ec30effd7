"""What a model knows: loss on text, tasks, intervals, recovery."""
