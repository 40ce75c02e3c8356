"""``python -m moesys``."""

from moesys.cli import main

if __name__ == "__main__":
    main()
