"""Linear algebra on adapters as factors: norms, errors, bounds; no d × d matrix is formed."""
