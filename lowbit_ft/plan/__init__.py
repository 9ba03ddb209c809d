"""`lowbit-ft plan`: what a run will hold in memory, counted from shapes before anything is loaded."""
