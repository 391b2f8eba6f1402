"""``python -m simdetr`` is the ``simdetr`` command."""

from simdetr.commands.main import main

if __name__ == "__main__":
    main()
