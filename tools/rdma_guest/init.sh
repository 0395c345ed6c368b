#!/bin/busybox sh
# The first process of the guest: mounts the host's files with a layer of memory over them, adds a Soft-RoCE device,
# runs the command, and powers off.
busybox=/bin/busybox
$busybox mkdir -p /proc /sys /dev /host /share /layer /all
$busybox mount -t proc proc /proc
$busybox mount -t sysfs sys /sys
$busybox mount -t devtmpfs dev /dev
for module in virtio_pci virtio_net 9pnet_virtio 9p overlay crc32_generic rdma_rxe; do
    $busybox modprobe $module || echo "the guest has no module $module"
done
$busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host
$busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 share /share
$busybox mount -t tmpfs -o size=80% layer /layer
$busybox mkdir /layer/upper /layer/work
$busybox cp -a /upper/. /layer/upper
$busybox mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work all /all
for folder in proc sys dev; do $busybox mount --move /$folder /all/$folder; done
$busybox mount -t tmpfs shm /all/tmp
$busybox mkdir -p /all/dev/shm && $busybox mount -t tmpfs shm /all/dev/shm
$busybox ip link set lo up
$busybox ip address add 10.0.2.15/24 dev eth0
$busybox ip link set eth0 up
$busybox chroot /all rdma link add rxe0 type rxe netdev eth0
$busybox chroot /all /bin/sh -e - </share/command
echo $? >/share/status
$busybox sync
$busybox poweroff -f
