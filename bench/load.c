/* load: an initiator that does nothing but READ(16) or WRITE(16) at random, many sessions on one thread.
 *
 * It is there for what fio with libiscsi 1.19 cannot ask: data digests, and 64 sessions that do not
 * fight each other for the processor. It checks what it gets (digests, lengths, status) and prints one line
 * of JSON.  cc -O2 -o load load.c ; ./load ADDRESS PORT TARGET LUN [options], options as in usage().
 * RFC 7143 section numbers stand where a field may surprise. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum { BHS = 48, LARGEST = 262144, MOST_DEPTH = 256, ROOM = 2 << 20 };

struct slot {
    uint64_t began, lba;
    uint32_t received;
    int busy;
};

struct session {
    int fd, depth, waiting;
    uint32_t cmd_sn, max_cmd_sn, exp_stat_sn;
    uint32_t immediate, largest_out; /* bytes; as settled at login */
    uint8_t *in, *out;
    size_t have, queued;
    struct slot slots[MOST_DEPTH];
};

static struct sockaddr_in address;
static const char *target;
static unsigned lun, block_size = 512;
static uint64_t blocks;
static int sessions = 1, depth = 32, writing, digests;
static uint32_t size = 4096;
static double seconds = 3;
static uint8_t *payload;
static size_t out_room; /* bytes; for everything that may be asked for at once */
static uint64_t completed, failed, histogram[64 << 6];
static int stopping, in_flight, logins, idle;

static void die(const char *what) {
    fprintf(stderr, "load: %s%s%s\n", what, errno ? ": " : "", errno ? strerror(errno) : "");
    exit(1);
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint32_t get32(const uint8_t *p) { return (uint32_t)p[0] << 24 | p[1] << 16 | p[2] << 8 | p[3]; }
static void put32(uint8_t *p, uint32_t v) { p[0] = v >> 24, p[1] = v >> 16, p[2] = v >> 8, p[3] = v; }
static void put64(uint8_t *p, uint64_t v) { put32(p, v >> 32), put32(p + 4, v); }
static uint32_t segment_length(const uint8_t *b) { return get32(b + 4) & 0xffffff; }

static uint64_t random64(void) { /* xorshift64: fast and good enough to spread LBAs */
    static uint64_t x = 88172645463325252ull;
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    return x;
}

/* CRC32C, §13.1: reflected polynomial 82F63B78h. */
static uint32_t crc_table[256];

static uint32_t crc_plain(uint32_t c, const uint8_t *p, size_t n) {
    while (n--) c = c >> 8 ^ crc_table[(c ^ *p++) & 255];
    return c;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc_fast(uint32_t c, const uint8_t *p, size_t n) {
    uint64_t w = c, v;
    for (; n >= 8; n -= 8, p += 8) memcpy(&v, p, 8), w = __builtin_ia32_crc32di(w, v);
    c = w;
    while (n--) c = __builtin_ia32_crc32qi(c, *p++);
    return c;
}
#endif

static uint32_t (*crc_update)(uint32_t, const uint8_t *, size_t) = crc_plain;

static void crc_init(void) {
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++) c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
        crc_table[i] = c;
    }
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2")) crc_update = crc_fast;
#endif
}

static uint32_t crc(const uint8_t *p, size_t n) { return ~crc_update(~0u, p, n); }

/* ---- sending ---------------------------------------------------------------------------------- */

static void flush(struct session *s) {
    size_t sent = 0;
    while (sent < s->queued) {
        ssize_t n = send(s->fd, s->out + sent, s->queued - sent, MSG_NOSIGNAL);
        if (n > 0) sent += n;
        else if (errno == EAGAIN) break;
        else die("send");
    }
    memmove(s->out, s->out + sent, s->queued - sent);
    s->queued -= sent;
}

static void queue(struct session *s, uint8_t *bhs, const void *data, uint32_t n, int digest) {
    uint8_t *p = s->out + s->queued;
    if (s->queued + n + BHS + 16 > out_room) errno = 0, die("the target does not take what it is sent");
    put32(bhs + 4, n);
    memcpy(p, bhs, BHS), p += BHS;
    /* Digests travel low byte first: the CRC's bit order of §13.1 comes out so on any machine. */
    if (digest) { uint32_t c = crc(bhs, BHS); p[0] = c, p[1] = c >> 8, p[2] = c >> 16, p[3] = c >> 24, p += 4; }
    if (n) {
        uint32_t padded = (n + 3) & ~3u;
        memcpy(p, data, n), memset(p + n, 0, padded - n);
        if (digest) { uint32_t c = crc(p, padded); p[padded] = c, p[padded + 1] = c >> 8, p[padded + 2] = c >> 16, p[padded + 3] = c >> 24; }
        p += padded + (digest ? 4 : 0);
    }
    s->queued = p - s->out;
}

static void issue(struct session *s, int i) {
    struct slot *t = &s->slots[i];
    if (stopping) return;
    if ((int32_t)(s->cmd_sn - s->max_cmd_sn) > 0) { s->waiting++; return; } /* §4.2.2.1: window closed */
    uint8_t b[BHS] = {0x01};
    uint32_t now_sent = writing ? (size < s->immediate ? size : s->immediate) : 0;
    t->lba = random64() % (blocks / (size / block_size)) * (size / block_size);
    t->received = 0, t->busy = 1, t->began = now(), in_flight++;
    b[1] = 0x80 | (writing ? 0x20 : 0x40) | 1; /* F, W or R, SIMPLE */
    b[9] = lun;
    put32(b + 16, i), put32(b + 20, size), put32(b + 24, s->cmd_sn++), put32(b + 28, s->exp_stat_sn);
    b[32] = writing ? 0x8a : 0x88;
    put64(b + 34, t->lba), put32(b + 42, size / block_size);
    queue(s, b, payload, now_sent, digests);
}

static void answer_r2t(struct session *s, const uint8_t *r) {
    uint32_t at = get32(r + 40), left = get32(r + 44), data_sn = 0;
    while (left) {
        uint32_t n = left < s->largest_out ? left : s->largest_out;
        uint8_t b[BHS] = {0x05};
        b[1] = n == left ? 0x80 : 0;
        memcpy(b + 8, r + 8, 16); /* LUN, initiator task tag, target transfer tag */
        put32(b + 20, get32(r + 20)), put32(b + 28, s->exp_stat_sn);
        put32(b + 36, data_sn++), put32(b + 40, at);
        queue(s, b, payload + at, n, digests);
        at += n, left -= n;
    }
}

/* ---- receiving -------------------------------------------------------------------------------- */

static void finish(struct session *s, uint32_t i, int status) {
    if (i >= (uint32_t)s->depth || !s->slots[i].busy) errno = 0, die("status for a task that is not there");
    struct slot *t = &s->slots[i];
    uint64_t took = now() - t->began;
    int top = took < 64 ? 6 : 63 - __builtin_clzll(took);
    histogram[top << 6 | (took >> (top - 6) & 63)]++;
    completed++;
    failed += status != 0 || (!writing && t->received != size);
    t->busy = 0, in_flight--;
    issue(s, i);
}

static void serial_numbers(struct session *s, const uint8_t *b, int has_status) {
    uint32_t max = get32(b + 32);
    if ((int32_t)(max - s->max_cmd_sn) > 0) s->max_cmd_sn = max;
    if (has_status) s->exp_stat_sn = get32(b + 24) + 1;
    while (s->waiting && !stopping && (int32_t)(s->cmd_sn - s->max_cmd_sn) <= 0)
        for (int i = 0; i < s->depth; i++)
            if (!s->slots[i].busy) { s->waiting--; issue(s, i); break; }
}

static void handle(struct session *s, const uint8_t *b) {
    uint32_t n = segment_length(b), itt = get32(b + 16);
    switch (b[0] & 0x3f) {
    case 0x25: /* Data-In; bit 0: S, the status is in it */
        if (itt < (uint32_t)s->depth) s->slots[itt].received += n;
        serial_numbers(s, b, b[1] & 1);
        if (b[1] & 1) finish(s, itt, b[3]);
        break;
    case 0x21:
        serial_numbers(s, b, 1);
        finish(s, itt, b[2] ? -1 : b[3]);
        break;
    case 0x31:
        serial_numbers(s, b, 0);
        answer_r2t(s, b);
        break;
    case 0x20: /* NOP-In */
        serial_numbers(s, b, itt != ~0u);
        if (get32(b + 20) != ~0u) {
            uint8_t r[BHS] = {0x40, 0x80};
            memcpy(r + 8, b + 8, 8), put32(r + 16, ~0u), memcpy(r + 20, b + 20, 4);
            put32(r + 24, s->cmd_sn), put32(r + 28, s->exp_stat_sn);
            queue(s, r, NULL, 0, digests);
        }
        break;
    default:
        errno = 0, fprintf(stderr, "opcode %02xh: ", b[0]), die("unexpected PDU");
    }
}

/* The whole PDUs in the buffer; returns what is left of it at its start. */
static void parse(struct session *s, int digest, void (*use)(struct session *, const uint8_t *)) {
    size_t at = 0, extra = digest ? 4 : 0;
    uint8_t whole[BHS]; /* the header as a handler sees it; its data follow in the buffer */
    while (s->have - at >= BHS + extra) {
        uint8_t *b = s->in + at;
        uint32_t n = segment_length(b), padded = (n + 3) & ~3u;
        size_t total = BHS + extra + b[4] * 4 + (n ? padded + extra : 0);
        if (total > ROOM) errno = 0, die("PDU longer than was declared");
        if (s->have - at < total) break;
        if (digest) {
            uint8_t *d = b + BHS + extra, *e = b + BHS;
            if (crc(b, BHS) != (e[0] | e[1] << 8 | e[2] << 16 | (uint32_t)e[3] << 24)) errno = 0, die("header digest");
            e = d + padded;
            if (n && crc(d, padded) != (e[0] | e[1] << 8 | e[2] << 16 | (uint32_t)e[3] << 24)) errno = 0, die("data digest");
        }
        memcpy(whole, b, BHS);
        use(s, digest ? whole : b);
        at += total;
    }
    memmove(s->in, s->in + at, s->have - at);
    s->have -= at;
}

static void receive(struct session *s) {
    ssize_t n = recv(s->fd, s->in + s->have, ROOM - s->have, 0);
    if (n > 0) s->have += n;
    else if (n == 0 || errno != EAGAIN) die("connection closed by the target");
}

/* ---- setting up ------------------------------------------------------------------------------- */

static const char *value(const char *text, size_t n, const char *key) {
    for (const char *p = text; p < text + n && *p; p += strlen(p) + 1)
        if (!strncmp(p, key, strlen(key)) && p[strlen(key)] == '=') return p + strlen(key) + 1;
    return NULL;
}

static int answered, login_done;

static void on_login(struct session *s, const uint8_t *b) {
    const char *text = (const char *)b + BHS, *v;
    uint32_t n = segment_length(b);
    if ((b[0] & 0x3f) != 0x23) errno = 0, die("no Login Response");
    if (b[36]) fprintf(stderr, "status %02x%02xh: ", b[36], b[37]), errno = 0, die("login refused");
    s->exp_stat_sn = get32(b + 24) + 1, s->max_cmd_sn = get32(b + 32);
    if ((v = value(text, n, "MaxRecvDataSegmentLength")) && (uint32_t)atoi(v) < s->largest_out) s->largest_out = atoi(v);
    if ((v = value(text, n, "FirstBurstLength")) && (uint32_t)atoi(v) < s->immediate) s->immediate = atoi(v);
    if ((v = value(text, n, "ImmediateData")) && !strcmp(v, "No")) s->immediate = 0;
    for (int i = 0; digests && i < 2; i++)
        if ((v = value(text, n, i ? "DataDigest" : "HeaderDigest")) && strcmp(v, "CRC32C")) errno = 0, die("the target refuses digests");
    answered = 1;
    login_done = (b[1] & 0x83) == 0x83; /* T, and NSG is the full feature phase */
}

static uint8_t reply[BHS + 256];

static void on_reply(struct session *s, const uint8_t *b) {
    uint32_t n = segment_length(b);
    if ((b[0] & 0x3f) == 0x25) {
        /* With digests the data stand behind the header digest in the buffer; see parse(). */
        memcpy(reply + BHS, s->in + BHS + (digests ? 4 : 0), n < 256 ? n : 256);
        if (!(b[1] & 1)) return;
    }
    memcpy(reply, b, BHS);
    serial_numbers(s, b, 1);
    answered = 1;
}

static void wait_for(struct session *s, int digest, void (*use)(struct session *, const uint8_t *)) {
    flush(s);
    for (answered = 0; !answered; parse(s, digest, use)) receive(s);
}

static int command(struct session *s, const uint8_t *cdb, uint32_t in) {
    uint8_t b[BHS] = {0x01, 0x80 | (in ? 0x40 : 0) | 1};
    b[9] = lun;
    put32(b + 16, MOST_DEPTH), put32(b + 20, in), put32(b + 24, s->cmd_sn++), put32(b + 28, s->exp_stat_sn);
    memcpy(b + 32, cdb, 16);
    queue(s, b, NULL, 0, digests);
    wait_for(s, digests, on_reply);
    return reply[3];
}

static void open_session(struct session *s, int number) {
    int on = 1;
    char text[1024];
    const char *digest = digests ? "CRC32C" : "None";
    s->in = malloc(ROOM), s->out = malloc(out_room), s->depth = depth;
    s->immediate = s->largest_out = LARGEST; /* what is asked for; the answer may lower it */
    s->cmd_sn = 1;
    if ((s->fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) die("socket");
    if (connect(s->fd, (void *)&address, sizeof address)) die("connect");
    setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    int n = snprintf(text, sizeof text,
                     "InitiatorName=iqn.2003-01.org.example:load%cTargetName=%s%cSessionType=Normal%c"
                     "HeaderDigest=%s%cDataDigest=%s%cMaxRecvDataSegmentLength=%d%cFirstBurstLength=%d%c"
                     "MaxBurstLength=%d%cInitialR2T=Yes%cImmediateData=Yes%cMaxOutstandingR2T=1%cMaxConnections=1%c"
                     "ErrorRecoveryLevel=0%cDefaultTime2Wait=2%cDefaultTime2Retain=0%c",
                     0, target, 0, 0, digest, 0, digest, 0, LARGEST, 0, LARGEST, 0, LARGEST, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int round = 0, done = 0; !done; round++) {
        uint8_t b[BHS] = {0x43, 0x87}; /* immediate Login Request; T, operational stage to full feature phase */
        if (round > 8) errno = 0, die("login does not end");
        b[8] = 0x80, b[9] = getpid() >> 8, b[10] = getpid(), b[12] = number >> 8, b[13] = number; /* ISID, random type, §11.12.5 */
        put32(b + 16, 1), put32(b + 24, s->cmd_sn), put32(b + 28, s->exp_stat_sn);
        queue(s, b, text, round ? 0 : n, 0);
        wait_for(s, 0, on_login);
        done = login_done;
    }
    if (logins || idle) return;
    const uint8_t ready[16] = {0}, capacity[16] = {0x9e, 0x10, [13] = 32};
    for (int i = 0; i < 10 && command(s, ready, 0); i++) { } /* unit attentions */
    if (command(s, capacity, 32)) errno = 0, die("READ CAPACITY(16)");
    blocks = ((uint64_t)get32(reply + BHS) << 32 | get32(reply + BHS + 4)) + 1, block_size = get32(reply + BHS + 8);
    if (size % block_size || blocks < size / block_size) errno = 0, die("--bs does not suit the disk");
}

static void close_session(struct session *s) {
    uint8_t b[BHS] = {0x46, 0x80}; /* Logout Request, reason 0: close the session */
    put32(b + 16, MOST_DEPTH), put32(b + 24, s->cmd_sn), put32(b + 28, s->exp_stat_sn);
    queue(s, b, NULL, 0, digests);
    wait_for(s, digests, on_reply);
    close(s->fd), free(s->in), free(s->out);
}

/* --logins: one session after another is opened and closed; a "command" is a login with its logout. */
static double measure_logins(struct session *s) {
    uint64_t began = now(), end = began + (uint64_t)(seconds * 1e9);
    while (now() < end) {
        memset(s, 0, sizeof *s);
        open_session(s, 1 + completed % 60000);
        close_session(s);
        completed++;
    }
    return (now() - began) / 1e9;
}

/* --idle: all sessions are open and say nothing until the input ends; whoever measures is told. */
static double measure_idle(void) {
    char byte;
    uint64_t began = now();
    puts("open"), fflush(stdout);
    while (read(0, &byte, 1) > 0) { }
    return (now() - began) / 1e9;
}

static double percentile(double share) {
    uint64_t want = completed * share, seen = 0;
    for (int i = 0; i < 64 << 6; i++)
        if ((seen += histogram[i]) > want) return (double)((uint64_t)(64 | (i & 63)) << ((i >> 6) - 6)) / 1000;
    return 0;
}

static void usage(void) {
    fprintf(stderr, "usage: load ADDRESS PORT TARGET LUN [--sessions N] [--depth N] [--bs BYTES] [--write] [--digests] [--logins | --idle] [--seconds S]\n");
    exit(2);
}

int main(int argc, char **argv) {
    static const struct option options[] = {{"sessions", 1, 0, 'n'}, {"depth", 1, 0, 'd'}, {"bs", 1, 0, 'b'},
        {"write", 0, 0, 'w'}, {"digests", 0, 0, 'c'}, {"seconds", 1, 0, 's'},
        {"logins", 0, 0, 'l'}, {"idle", 0, 0, 'i'}, {0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) switch (c) {
        case 'n': sessions = atoi(optarg); break;
        case 'd': depth = atoi(optarg); break;
        case 'b': size = atoi(optarg); break;
        case 'w': writing = 1; break;
        case 'c': digests = 1; break;
        case 's': seconds = atof(optarg); break;
        case 'l': logins = 1; break;
        case 'i': idle = 1; break;
        default: usage();
    }
    if (argc - optind != 4 || depth < 1 || depth > MOST_DEPTH || sessions < 1 || size < 512 || size > LARGEST) usage();
    address.sin_family = AF_INET;
    address.sin_port = htons(atoi(argv[optind + 1]));
    address.sin_addr.s_addr = inet_addr(argv[optind]);
    target = argv[optind + 2], lun = atoi(argv[optind + 3]);
    crc_init();
    payload = malloc(size);
    out_room = (depth + 1) * (2 * (size_t)size + 4096);
    for (uint32_t i = 0; i < size; i++) payload[i] = random64();
    struct session *all = calloc(sessions, sizeof *all);
    int poll = epoll_create1(0);
    double took = 0;
    if (logins) sessions = 0, took = measure_logins(&all[0]);
    for (int i = 0; i < sessions; i++) {
        open_session(&all[i], i + 1);
        struct epoll_event e = {EPOLLIN, {.ptr = &all[i]}};
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &e);
    }
    if (idle) took = measure_idle();
    for (int i = 0; i < sessions; i++) fcntl(all[i].fd, F_SETFL, O_NONBLOCK);
    uint64_t began = now(), end = began + (uint64_t)(seconds * 1e9);
    for (int i = 0; i < sessions && !idle; i++) {
        for (int k = 0; k < depth; k++) issue(&all[i], k);
        flush(&all[i]);
    }
    while (!idle && sessions && (!stopping || in_flight)) {
        stopping = now() >= end;
        struct epoll_event events[64];
        int n = epoll_wait(poll, events, 64, 1000);
        if (n == 0) errno = 0, die("the target has been silent for a second");
        for (int i = 0; i < n; i++) {
            struct session *s = events[i].data.ptr;
            receive(s);
            parse(s, digests, handle);
            flush(s);
            /* What the socket did not take goes out with the next turn; watch for room meanwhile. */
            struct epoll_event e = {s->queued ? EPOLLIN | EPOLLOUT : EPOLLIN, {.ptr = s}};
            if (s->queued || events[i].events & EPOLLOUT) epoll_ctl(poll, EPOLL_CTL_MOD, s->fd, &e);
        }
    }
    if (!took) took = (now() - began) / 1e9;
    for (int i = 0; i < sessions; i++) {
        fcntl(all[i].fd, F_SETFL, 0);
        close_session(&all[i]);
    }
    printf("{\"ios\": %llu, \"iops\": %.0f, \"p50_us\": %.1f, \"p99_us\": %.1f, \"errors\": %llu}\n",
           (unsigned long long)completed, completed / took, percentile(0.50), percentile(0.99), (unsigned long long)failed);
    return failed != 0;
}
