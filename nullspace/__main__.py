"""`python -m nullspace`, and the entry point of the `nullspace` command."""

from nullspace.errors import MissingPackageError


def main() -> None:
    """Run the command; a line on what to install, if the packages of the command line are not."""
    try:
        from nullspace import cli
    except MissingPackageError as error:
        raise SystemExit(str(error)) from None
    cli.main()


if __name__ == "__main__":
    main()
