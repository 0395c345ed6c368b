"""Engines that place the hosts of a topology on machines; each host itself is run by `triptych up FILE --host NAME`."""
