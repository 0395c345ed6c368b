"""A QEMU guest with an RDMA device, for hosts whose kernel or network card has none: `python -m ... rdma_guest`."""
