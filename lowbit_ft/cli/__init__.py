"""The command line: one command per stage (main.py), what `plan` prints, `init`, `import-recipe`, `serve`."""
