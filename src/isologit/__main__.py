"""`python -m isologit`."""

from isologit.cli import main

if __name__ == "__main__":
    main()
