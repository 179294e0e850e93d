#!/bin/sh
# Builds what the benchmark measures with, into bench/build: limit (the floor), load (our own initiator) and
# fio with its libiscsi engine, which no Debian package has. What is already there is kept.
#
# fio comes from Debian's source package, found through the apt sources that this machine already uses.
set -eu
umask 022
cd "$(dirname "$0")"
mkdir -p build

for program in limit load; do
    if [ ! -x "build/$program" ] || [ "$program.c" -nt "build/$program" ]; then
        echo "building $program" >&2
        cc -O2 -o "build/$program" "$program.c"
    fi
done

if [ -x build/fio ]; then
    exit 0
fi

give_up() {
    echo "notice: no fio with the libiscsi engine: $*" >&2
    exit 0
}

command -v apt-get >/dev/null || give_up 'its source is taken from Debian, and there is no apt-get'
[ -e /usr/include/iscsi/iscsi.h ] || give_up 'libiscsi-dev is not installed'

# apt reads source packages only where a list says deb-src. So: a private copy of this machine's lists that
# says so, private state beside it, and nothing of the system is touched.
apt=$PWD/build/apt
rm -rf "$apt"
mkdir -p "$apt/sources" "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/download"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -e "$file" ] && sed -n 's/^deb[[:space:]]/deb-src /p' "$file" >"$apt/sources/$(basename "$file" .list).list"
done
for file in /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] && sed 's/^Types:.*/Types: deb-src/' "$file" >"$apt/sources/$(basename "$file")"
done
private="-qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts=$apt/sources
    -o Dir::State::lists=$apt/lists -o Dir::Cache=$apt/cache -o APT::Sandbox::User=
    -o Acquire::Retries=2 -o Acquire::http::Timeout=30"

echo 'building fio with the libiscsi engine' >&2
log=$PWD/build/fio.log
{
    timeout 300 apt-get $private update &&
        (cd "$apt/download" && timeout 300 apt-get $private source --download-only fio)
} >"$log" 2>&1 || give_up "its source cannot be had (see bench/build/fio.log)"

mkdir "$apt/fio"
tar -xf "$apt"/download/fio_*.orig.tar.[gx]z -C "$apt/fio" --strip-components=1
(
    cd "$apt/fio"
    ./configure --enable-libiscsi --disable-native && grep -q '^#define CONFIG_LIBISCSI' config-host.h && make -j2 fio
) >>"$log" 2>&1 || give_up 'it does not build (see bench/build/fio.log)'
cp "$apt/fio/fio" build/fio
rm -rf "$apt"
