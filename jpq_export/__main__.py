"""`python -m jpq_export`."""

from jpq_export.cli import main

main()
