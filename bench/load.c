/* Load a server on 127.0.0.1 as fast as it answers, or echo datagrams. compare.py compiles it.
 *
 *   load fresh|kept|udp HOST PORT SECONDS WIDTH REQUESTS COUNT LENGTH PREFIX
 *   load both HOST PORT SECONDS WIDTH (REQUESTS COUNT LENGTH PREFIX of fresh) (... of udp)
 *   load echo PORT
 *
 * fresh: a TCP connection for each request, WIDTH at a time, read until the server closes.
 * kept: WIDTH connections, one request after the other on each.
 * udp: WIDTH datagrams under way.
 * both: fresh and udp at once.
 *
 * REQUESTS is a file with COUNT requests of one size, taken in turn. A reply counts if it begins
 * with PREFIX and has LENGTH bytes (0: any length). The program never sleeps: epoll with a
 * time-out of 0, on a core of its own. It prints one line of JSON.
 */

/* For recvmmsg and sendmmsg. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

enum {
    /* Requests at a time. */
    MAX_WIDTH = 256,
    /* Of a reply: more is read in further calls. */
    REPLY_BYTES = 65536,
    /* The last place of the histogram of latencies. */
    SLOWEST_US = 2000000,
    /* After this time without any datagram, those under way are lost. */
    LOST_AFTER_US = 20000
};

struct kind {
    char *octets;
    int size;
    int count;
    int next;
    int length;
    const char *prefix;
    int prefix_size;
};

struct slot {
    int fd;
    int got;
    char head[64];
    long long started_us;
};

struct total {
    long done;
    long failed;
    unsigned *taken_us;
};

static struct sockaddr_in server;
static int epoll;

static void stop(const char *what)
{
    perror(what);
    exit(1);
}

static long long now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static struct kind read_kind(char **arguments)
{
    struct kind kind = {0};
    FILE *file = fopen(arguments[0], "rb");
    if (!file) stop(arguments[0]);
    kind.octets = malloc(1 << 24);
    int whole = (int)fread(kind.octets, 1, 1 << 24, file);
    fclose(file);
    kind.count = atoi(arguments[1]);
    kind.size = whole / kind.count;
    kind.length = atoi(arguments[2]);
    kind.prefix = arguments[3];
    kind.prefix_size = (int)strlen(kind.prefix);
    return kind;
}

static char *next_request(struct kind *kind)
{
    kind->next = (kind->next + 1) % kind->count;
    return kind->octets + (size_t)kind->next * kind->size;
}

static int is_right(const struct kind *kind, const char *head, int got)
{
    return got >= kind->prefix_size
        && !memcmp(head, kind->prefix, kind->prefix_size)
        && (!kind->length || got == kind->length);
}

static void count(struct total *total, int right, long long started_us)
{
    long long taken_us = now_us() - started_us;
    if (right) total->done++; else total->failed++;
    total->taken_us[taken_us < SLOWEST_US ? taken_us : SLOWEST_US]++;
}

/* Send a slot's next request, on a new connection if it has none. */
static void ask(struct slot *slot, struct kind *kind, struct total *total, int kept)
{
    /* Of a fresh connection only the end counts: then the whole reply is there, in one call. */
    struct epoll_event wanted = {kept ? EPOLLIN : EPOLLRDHUP, {.ptr = slot}};
    slot->started_us = now_us();
    slot->got = 0;
    if (slot->fd < 0) {
        /* On the loopback interface the handshake is over when connect returns, so it may block. */
        slot->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (slot->fd < 0) stop("socket");
        if (connect(slot->fd, (struct sockaddr *)&server, sizeof server)) stop("connect");
        epoll_ctl(epoll, EPOLL_CTL_ADD, slot->fd, &wanted);
    }
    /* A request fits any socket's buffer. */
    ssize_t sent = send(slot->fd, next_request(kind), kind->size, MSG_NOSIGNAL);
    if (sent != kind->size) total->failed++;
}

/* Read what is there; ask again when the reply is whole (kept) or the server has closed (fresh). */
static void hear(struct slot *slot, struct kind *kind, struct total *total, int kept)
{
    static char reply[REPLY_BYTES];
    int got = (int)recv(slot->fd, reply, sizeof reply, MSG_DONTWAIT);
    if (got < 0 && errno == EAGAIN) return;
    int room = (int)sizeof slot->head - slot->got;
    if (got > 0 && room > 0) memcpy(slot->head + slot->got, reply, got < room ? got : room);
    if (got > 0) slot->got += got;
    if (kept && got > 0 && slot->got < kind->length) return;
    count(total, got > 0 && is_right(kind, slot->head, slot->got), slot->started_us);
    if (!kept || got <= 0) {
        close(slot->fd);
        slot->fd = -1;
    }
    ask(slot, kind, total, kept);
}

/* Keep some datagrams under way. All calls to the kernel take many at once, so that they are not
 * the limit. */
static void exchange_datagrams(int udp, int width, struct kind *kind, struct total *total)
{
    static struct mmsghdr messages[MAX_WIDTH];
    static struct iovec pieces[MAX_WIDTH];
    static char replies[MAX_WIDTH][2048];
    static long long heard_us;
    static int under_way;
    for (int i = 0; i < width; i++) {
        pieces[i] = (struct iovec){replies[i], sizeof replies[i]};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &pieces[i], .msg_iovlen = 1};
    }
    int got = recvmmsg(udp, messages, width, MSG_DONTWAIT, NULL);
    for (int i = 0; i < got; i++) {
        int right = is_right(kind, replies[i], (int)messages[i].msg_len);
        if (right) total->done++; else total->failed++;
    }
    if (got > 0) {
        heard_us = now_us();
        under_way -= got < under_way ? got : under_way;
    } else if (now_us() - heard_us > LOST_AFTER_US) {
        heard_us = now_us();
        under_way = 0;
    }

    /* Some at once are cheaper to send than each alone. */
    if (under_way > width / 2) return;
    int wanted = width - under_way;
    for (int i = 0; i < wanted; i++)
        pieces[i] = (struct iovec){next_request(kind), kind->size};
    int sent = sendmmsg(udp, messages, wanted, MSG_DONTWAIT);
    if (sent > 0) under_way += sent;
}

static void echo(int port)
{
    static char datagram[2048];
    struct sockaddr_in from = {
        .sin_family = AF_INET,
        .sin_port = htons(port),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    int udp = socket(AF_INET, SOCK_DGRAM, 0);
    if (bind(udp, (struct sockaddr *)&from, sizeof from)) stop("bind");
    for (;;) {
        socklen_t size = sizeof from;
        struct sockaddr *address = (struct sockaddr *)&from;
        ssize_t got = recvfrom(udp, datagram, sizeof datagram, 0, address, &size);
        if (got >= 0) sendto(udp, datagram, got, 0, address, size);
    }
}

static int percentile_us(const struct total *total, double part)
{
    long left = (long)((total->done + total->failed) * part);
    int us = 0;
    while (us < SLOWEST_US && (left -= total->taken_us[us]) > 0) us++;
    return us;
}

static void print_figures(
    const struct total *requests, const struct total *packets, double seconds)
{
    printf("{\"done\": %ld, \"failed\": %ld, ", requests->done, requests->failed);
    printf("\"p50_us\": %d, ", percentile_us(requests, 0.5));
    printf("\"p99_us\": %d, ", percentile_us(requests, 0.99));
    printf("\"datagrams\": %ld, \"bad_datagrams\": %ld, ", packets->done, packets->failed);
    printf("\"seconds\": %.6f}\n", seconds);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "echo")) echo(atoi(argv[2]));
    if (argc < 10 || (!strcmp(argv[1], "both") && argc < 14)) {
        fputs("usage: see the head of load.c\n", stderr);
        return 2;
    }
    int kept = !strcmp(argv[1], "kept");
    int both = !strcmp(argv[1], "both");
    int datagrams = both || !strcmp(argv[1], "udp");
    int streams = both || !datagrams;
    int width = atoi(argv[5]) < MAX_WIDTH ? atoi(argv[5]) : MAX_WIDTH;
    struct kind tcp = read_kind(argv + 6);
    struct kind udp = read_kind(argv + (both ? 10 : 6));
    struct total requests = {0, 0, calloc(SLOWEST_US + 1, sizeof(unsigned))};
    struct total packets = {0};
    static struct slot slots[MAX_WIDTH];
    struct epoll_event ready[MAX_WIDTH];

    server = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[3]))};
    if (inet_pton(AF_INET, argv[2], &server.sin_addr) != 1) stop("HOST");
    epoll = epoll_create1(0);
    int udp_fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (connect(udp_fd, (struct sockaddr *)&server, sizeof server)) stop("connect");

    long long started_us = now_us();
    long long end_us = started_us + (long long)(atof(argv[4]) * 1e6);
    for (int i = 0; streams && i < width; i++) {
        slots[i].fd = -1;
        ask(&slots[i], &tcp, &requests, kept);
    }
    while (now_us() < end_us) {
        int count_ready = streams ? epoll_wait(epoll, ready, MAX_WIDTH, 0) : 0;
        for (int i = 0; i < count_ready; i++) hear(ready[i].data.ptr, &tcp, &requests, kept);
        if (datagrams) exchange_datagrams(udp_fd, width, &udp, &packets);
    }
    print_figures(&requests, &packets, (now_us() - started_us) / 1e6);
    return 0;
}
