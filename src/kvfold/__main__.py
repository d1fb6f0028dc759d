"""`python -m kvfold`, and the `kvfold` command."""

import sys


def main() -> None:
    """Runs the command line; says which extra to install when it is missing."""
    try:
        from .cli import app
    except ImportError as error:
        sys.exit(str(error))
    app()


if __name__ == "__main__":
    main()
