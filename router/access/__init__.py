"""Who may use the router: API keys, whose streams are whose, and the limits of each key."""
