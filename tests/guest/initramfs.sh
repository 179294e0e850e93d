#!/bin/sh
# Makes what an emulated PC starts with:   initramfs.sh ROOT BASE RELEASE FILE
#
# ROOT has busybox and modprobe; BASE, a path in it, has lib/modules/RELEASE. FILE is made: an initramfs that
# finds the guest's root among the host's files.
set -eu
root=$1 base=$2 release=$3 file=$4
making=$(mktemp -d)
trap 'rm -rf "$making"' EXIT

chroot "$root" depmod -b "$base" "$release"
mkdir "$making/host" "$making/root"
cp "$root/usr/bin/busybox" "$making"
for module in virtio_pci virtio_blk virtio_net virtiofs overlay; do
    chroot "$root" modprobe -d "$base" -S "$release" --show-depends "$module"
done | while read -r how path _; do
    [ "$how" = insmod ] || continue
    [ ! -e "$making/${path##*/}" ] || continue
    cp "$root$path" "$making"
    echo "${path##*/}" >>"$making/order"
done
cat >"$making/init" <<'EOF'
#!/busybox sh
# Process 1: the host's files by virtiofs, and the guest's root among them with the modules laid over it.
# $1 root, $2 modules, or "-" where the root has them, $3 repository on the host, $4 host:port of the stage's
# control service, or "probe".
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
for module in $(/busybox cat /order); do
    /busybox insmod /$module
done
/busybox mount -t virtiofs -o ro host /host
if [ "$2" = - ]; then
    /busybox mount -o bind "/host$1" /root
else
    /busybox mount -t overlay -o "ro,lowerdir=/host$2:/host$1" none /root
fi
/busybox mount -o bind "/host$3" /root/repo
/busybox mount -t proc proc /root/proc
# Threads of the kernel, ZFS' own among them, find a disk by its path as process 1 does.
/busybox mount -t devtmpfs dev /root/dev
exec /busybox switch_root /root /repo/tests/guest/inside/init "$3" "$4"
EOF
chmod 755 "$making/init"
(cd "$making" && find . | "$root/usr/bin/busybox" cpio -o -H newc) >"$file"
