"""`python -m nas`: the same as `nas`, of the code in the present folder; so a job runs what was shipped with it."""

from nas.cli.main import run

if __name__ == "__main__":
    run()
