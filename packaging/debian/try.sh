#!/bin/sh
# Unpacks a package that build.sh made and runs what is in it: both programs, and the daemon up to "ready"
# and down again.   packaging/debian/try.sh FILE.deb
#
# In a mount namespace of its own, so that the package's /opt is where its programs look for it and nothing
# is installed. Needs root, or user namespaces.
set -eu
deb=$(realpath "$1")
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
dpkg-deb -x "$deb" "$root"
for file in usr/bin/iscsi-targetd usr/bin/iscsi-targetctl usr/lib/systemd/system/iscsi-targetd.service \
    usr/lib/systemd/system/iscsi-targetd.socket usr/lib/sysusers.d/iscsi-targetd.conf \
    usr/share/man/man8/iscsi-targetd.8.gz usr/share/man/man8/iscsi-targetctl.8.gz; do
    [ -e "$root/$file" ] || [ -L "$root/$file" ] || {
        echo "$deb has no /$file" >&2
        exit 1
    }
done
user=
[ "$(id -u)" = 0 ] || user=--map-root-user
# shellcheck disable=SC2016 # the inner shell expands
unshare --mount $user sh -eu -c '
    mount --bind "$1/opt" /opt
    unset PYTHONPATH
    cd /
    /opt/iscsi-targetd/bin/iscsi-targetd --version
    /opt/iscsi-targetd/bin/iscsi-targetctl --version
    mkfifo "$1/log"
    /opt/iscsi-targetd/bin/iscsi-targetd serve --state-dir "$1/state" \
        --portal 127.0.0.1:13260 --api 127.0.0.1:18260 >"$1/log" 2>&1 &
    daemon=$!
    while read -r line; do
        echo "$line"
        case $line in *"targetd: ready") kill "$daemon" ;; esac
    done <"$1/log"
    wait "$daemon"
' sh "$root"
echo "$deb works"
