"""Who may ask a server for what, and how much of it: API keys, name spaces, limits, fairness."""
