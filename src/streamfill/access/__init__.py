"""Who may use a cluster: API keys, and the file that they are kept in."""
