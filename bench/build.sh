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
# says so, private state beside it, and nothing of the system is touched. All of it in a temporary place,
# since neither apt's options nor fio's makefile bear a path with blanks.
log=$PWD/build/fio.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$scratch/sources" "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/download" "$scratch/fio"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -e "$file" ] && sed -n 's/^deb[[:space:]]/deb-src /p' "$file" >"$scratch/sources/$(basename "$file" .list).list"
done
for file in /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] && sed 's/^Types:.*/Types: deb-src/' "$file" >"$scratch/sources/$(basename "$file")"
done

private_apt() {
    timeout 300 apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$scratch/sources" \
        -o Dir::State::lists="$scratch/lists" -o Dir::Cache="$scratch/cache" -o APT::Sandbox::User= \
        -o Acquire::Retries=2 -o Acquire::http::Timeout=30 "$@"
}

echo 'building fio with the libiscsi engine' >&2
(cd "$scratch/download" && private_apt update && private_apt source --download-only fio) >"$log" 2>&1 ||
    give_up "its source cannot be had (see bench/build/fio.log)"
tar -xf "$scratch"/download/fio_*.orig.tar.[gx]z -C "$scratch/fio" --strip-components=1
(
    cd "$scratch/fio"
    ./configure --enable-libiscsi --disable-native && grep -q '^#define CONFIG_LIBISCSI' config-host.h && make -j2 fio
) >>"$log" 2>&1 || give_up 'it does not build (see bench/build/fio.log)'
cp "$scratch/fio/fio" build/fio
