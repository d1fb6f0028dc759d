"""The script `kvfold`."""

import sys


def main() -> None:
    """Runs the command line; says which extra to install when it is missing."""
    try:
        from .app import app
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)  # of what cannot run (`failures.WRONG`, which needs the extra); 1 is a check that failed
    except KeyboardInterrupt:
        print("kvfold: interrupted", file=sys.stderr)
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
