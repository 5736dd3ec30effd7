"""Quality at equal tokens: ATP, its ablations, and what cuts first and tunes afterwards."""
