"""Tasks, their text and tokens, scores and results. ``molora.train`` builds on this room; never the other way."""
