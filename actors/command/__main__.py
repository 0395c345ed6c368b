"""`python -m triptych.actors.command`."""

from triptych.actors.command import main

main()
