#!/bin/sh
# What zfs.py has mmdebstrap do last:   zfs.sh ROOT
#
# ROOT has a compiler and the headers of one kernel. Makes ROOT/out of it: that kernel, its modules with those
# of ZFS among them, and an initramfs that finds the guest's root. The package's own postinst would do the
# compiling by dkms, with debug information and for one module after the other; nothing of it runs.
set -eu
work=/usr/src/guest
cd "$1"
headers=$(cd usr/src && echo linux-headers-*-cloud-amd64)
release=${headers#linux-headers-}
took() {
    echo "took $1: $(($(date +%s) - since)) s"
    since=$(date +%s)
}
since=$(date +%s)

mkdir -p ".$work" out/modules/usr/lib
for package in zfs-dkms "linux-image-$release"; do
    chroot . sh -c "cd $work && apt-get -qq -o APT::Sandbox::User=root download $package"
    dpkg-deb --extract ".$work/$package"_*.deb ".$work/$package"
done
took download

cat >".$work/build" <<EOF
set -eu
export KERNEL_CC=gcc TEST_JOBS=$(nproc)
cd $work/zfs-dkms/usr/src/zfs-*
./configure --quiet --with-config=kernel \
    --with-linux=/usr/src/linux-headers-${release%-cloud-amd64}-common --with-linux-obj=/usr/src/$headers
date +%s >$work/configured
make --quiet --jobs=$(nproc) KCFLAGS=-g0
mkdir $work/linux-image-$release/lib/modules/$release/zfs
cp module/*/*.ko $work/linux-image-$release/lib/modules/$release/zfs
EOF
chroot . sh "$work/build" >".$work/log" 2>&1 || {
    tail -n 40 ".$work/log"
    exit 1
}
echo "took configure: $(($(cat ".$work/configured") - since)) s"
since=$(cat ".$work/configured")
took make

mv ".$work/linux-image-$release/boot/vmlinuz-$release" out/vmlinuz
mv ".$work/linux-image-$release/lib/modules" out/modules/usr/lib
chroot . depmod -b /out/modules/usr "$release"

# What is loaded before there is a root to load it from.
mkdir -p ".$work/initramfs/host" ".$work/initramfs/root"
cp usr/bin/busybox ".$work/initramfs"
for module in virtio_pci virtio_blk virtio_net virtiofs overlay; do
    chroot . modprobe -d /out/modules/usr -S "$release" --show-depends "$module"
done | while read -r how file _; do
    [ "$how" = insmod ] || continue
    [ ! -e ".$work/initramfs/${file##*/}" ] || continue
    cp ".$file" ".$work/initramfs"
    echo "${file##*/}" >>".$work/initramfs/order"
done
cat >".$work/initramfs/init" <<'EOF'
#!/busybox sh
# Process 1: the host's files by virtiofs, and the guest's root among them with the modules laid over it.
# $1 root, $2 modules, $3 repository on the host, $4 host:port of the stage's control service.
set -eu
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
for module in $(/busybox cat /order); do
    /busybox insmod /$module
done
/busybox mount -t virtiofs -o ro host /host
/busybox mount -t overlay -o "ro,lowerdir=/host$2:/host$1" none /root
/busybox mount -o bind "/host$3" /root/repo
/busybox mount -t proc proc /root/proc
# Threads of the kernel, ZFS' own among them, find a disk by its path as process 1 does.
/busybox mount -t devtmpfs dev /root/dev
exec /busybox switch_root /root /repo/tests/guest/inside/init "$3" "$4"
EOF
chmod 755 ".$work/initramfs/init"
chroot . sh -c "cd $work/initramfs && find . | cpio --quiet -o -H newc" >out/initramfs
took initramfs
