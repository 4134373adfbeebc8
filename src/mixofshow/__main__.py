"""`python -m mixofshow` is the command line."""

from mixofshow.cli import main

if __name__ == "__main__":
    main()
