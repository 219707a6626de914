"""`python -m miro` is `miro`."""

from miro.cli import main

if __name__ == "__main__":
    main()
