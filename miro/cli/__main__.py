"""`python -m miro.cli` is `miro`."""

from miro.cli.main import main

if __name__ == "__main__":
    main()
