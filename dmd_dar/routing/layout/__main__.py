"""python -m dmd_dar.routing.layout"""

from dmd_dar.routing.layout.command import main

if __name__ == "__main__":
    main()
