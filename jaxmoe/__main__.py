"""`python -m jaxmoe` is the command line."""

from jaxmoe.cli import main

if __name__ == "__main__":
    main()
