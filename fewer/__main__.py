"""`python -m fewer`."""

from fewer.cli.app import main

if __name__ == "__main__":
    main()
