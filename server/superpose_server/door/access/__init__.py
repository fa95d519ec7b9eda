"""Who may call what: tokens, the scope that each call needs, and the limits of a token."""
