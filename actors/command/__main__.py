"""`python -m actors.command`."""

from actors.command import main

main()
