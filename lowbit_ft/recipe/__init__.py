"""The recipe: what a run is, in one YAML file, checked as a whole before anything is loaded."""
