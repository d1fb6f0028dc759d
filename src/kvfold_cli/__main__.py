"""The script `kvfold`."""

import sys


def main() -> None:
    """Runs the command line; says which extra to install when it is missing."""
    try:
        from .app import app
    except ImportError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("kvfold: interrupted", file=sys.stderr)
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
