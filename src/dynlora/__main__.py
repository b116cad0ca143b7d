"""``python -m dynlora`` is the command ``dynlora``."""

from dynlora.cli.main import main

if __name__ == "__main__":
    main()
