"""`python -m cohortium`."""

from cohortium.cli.app import main

main()
