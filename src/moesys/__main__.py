"""``python -m moesys``, which is also what ``torchrun -m moesys`` runs."""

from moesys.cli import main

if __name__ == "__main__":
    main()
