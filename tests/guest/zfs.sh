#!/bin/sh
# What zfs.py has mmdebstrap do last:   zfs.sh ROOT
#
# ROOT has a compiler and the headers of one kernel. Makes ROOT/out of it: that kernel, its modules with those
# of ZFS among them, and an initramfs that finds the guest's root. The package's own postinst would do the
# compiling by dkms, with debug information and for one module after the other; nothing of it runs.
set -eu
work=/usr/src/guest
initramfs=$(realpath "$(dirname "$0")/initramfs.sh")
cd "$1"
headers=$(cd usr/src && echo linux-headers-*-amd64)
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
    --with-linux=/usr/src/linux-headers-${release%-amd64}-common --with-linux-obj=/usr/src/$headers
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
"$initramfs" "$PWD" /out/modules/usr "$release" out/initramfs
took initramfs
