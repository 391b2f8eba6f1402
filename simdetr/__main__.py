"""``python -m simdetr`` is the ``simdetr`` command."""

from simdetr.cli import main

if __name__ == "__main__":
    main()
