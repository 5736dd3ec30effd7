"""Quality at equal tokens: ATP, its ablations and the two-stage ways."""
