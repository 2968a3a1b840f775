"""`python -m nullspace`."""

from nullspace.cli import main

if __name__ == "__main__":
    main()
