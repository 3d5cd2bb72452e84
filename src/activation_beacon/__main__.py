"""`python -m activation_beacon`: the command line without its script."""

from activation_beacon.cli import main

if __name__ == "__main__":
    main()
