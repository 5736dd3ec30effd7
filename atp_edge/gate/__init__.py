"""Ship or do not ship: the dense tuned model against what ships, slice by slice."""
