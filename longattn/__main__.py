"""`python -m longattn` is the console script `longattn`."""

from longattn.cli import main

if __name__ == "__main__":
    main()
