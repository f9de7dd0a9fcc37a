"""`python -m stackwise`."""

from stackwise.cli.main import run

if __name__ == "__main__":
    run()
