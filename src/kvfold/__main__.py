"""`python -m kvfold`: the `kvfold` command, but for the seconds that importing torch takes."""

from kvfold_cli.__main__ import main

if __name__ == "__main__":
    main()
