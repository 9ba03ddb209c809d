"""`python -m lowbit_ft` is the `lowbit-ft` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
