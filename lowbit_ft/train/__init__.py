"""The train section of a recipe: the loop on one screen (loop.py), and what it calls (run.py)."""
