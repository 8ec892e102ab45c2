"""python -m dmd_dar COMMAND [key=value ...]: the command `dmd-dar`."""

from dmd_dar.commands import main

if __name__ == "__main__":
    main()
