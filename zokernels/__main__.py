"""``python -m zokernels``."""

from zokernels.cli import main

if __name__ == "__main__":
    main()
