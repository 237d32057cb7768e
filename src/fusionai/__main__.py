"""`python -m fusionai`: the command line."""

from fusionai.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
