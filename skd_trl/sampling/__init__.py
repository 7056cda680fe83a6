"""How responses are written: student and teacher together, over a cache in which rows go back for free."""
