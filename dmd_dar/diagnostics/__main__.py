"""python -m dmd_dar.diagnostics"""

from dmd_dar.diagnostics.command import main

if __name__ == "__main__":
    main()
