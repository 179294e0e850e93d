#!/bin/sh
# Makes a Debian package from this tree, without debhelper.   packaging/debian/build.sh [OUTPUT-DIR]
#
# Dependencies that Debian lacks or has too old come along, in a virtual environment of the system's Python
# below /opt/iscsi-targetd; so the package belongs to one Python version and architecture.
set -eu
umask 022
cd "$(dirname "$0")/../.."
out=${1:-dist}
python=/usr/bin/python3
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
minor=$("$python" -c 'import sys; print(sys.version_info[1])')
architecture=$(dpkg --print-architecture)
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"

mkdir -p "$root/DEBIAN" "$root/usr/bin" "$root/usr/share/man/man8" "$root/opt" \
    "$root/usr/lib/systemd/system" "$root/usr/lib/sysusers.d" "$root/usr/share/doc/iscsi-targetd"
"$python" -m venv "$root/opt/iscsi-targetd"
"$root/opt/iscsi-targetd/bin/pip" install -q --no-input --no-compile .
find "$root/opt/iscsi-targetd/bin" -type f -exec sed -i "1s|^#!$root|#!|" {} +
find "$root" -name __pycache__ -type d -prune -exec rm -rf {} +
for program in iscsi-targetd iscsi-targetctl; do
    ln -s "/opt/iscsi-targetd/bin/$program" "$root/usr/bin/$program"
    gzip -9nc "packaging/$program.8" >"$root/usr/share/man/man8/$program.8.gz"
done
install -m 644 packaging/iscsi-targetd.service packaging/iscsi-targetd.socket "$root/usr/lib/systemd/system/"
install -m 644 packaging/iscsi-targetd.sysusers "$root/usr/lib/sysusers.d/iscsi-targetd.conf"
install -m 644 LICENSE "$root/usr/share/doc/iscsi-targetd/copyright"
cat >"$root/DEBIAN/control" <<CONTROL
Package: iscsi-targetd
Version: $version
Architecture: $architecture
Maintainer: iscsi-targetd <root@localhost>
Section: net
Priority: optional
Depends: python3 (>= 3.$minor), python3 (<< 3.$((minor + 1))), systemd
Description: iSCSI target daemon with an embedded REST API
 Serves files and block devices as iSCSI disks; configured live through a REST API.
CONTROL
cat >"$root/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
systemd-sysusers iscsi-targetd.conf
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    systemctl try-restart iscsi-targetd.service
fi
SCRIPT
cat >"$root/DEBIAN/prerm" <<'SCRIPT'
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now iscsi-targetd.service
fi
SCRIPT
chmod 755 "$root/DEBIAN/postinst" "$root/DEBIAN/prerm"
mkdir -p "$out"
dpkg-deb --root-owner-group -b "$root" "$out/iscsi-targetd_${version}_${architecture}.deb"
