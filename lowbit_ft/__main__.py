"""`python -m lowbit_ft` is the `lowbit-ft` command."""

from lowbit_ft.cli import main

if __name__ == "__main__":
    main()
