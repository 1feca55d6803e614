/* Who may write, and a log of who wrote: one JSON line per attempted write in writes.log beside the state file. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "driver.h"

#define CAP_SYS_ADMIN_BIT 21

/* The kernel module asks capable(CAP_SYS_ADMIN) for the calling thread; so do we, from its effective set. */
bool sim_may_write(void)
{
    FILE *status = fopen("/proc/thread-self/status", "re");
    if (status == NULL) status = fopen("/proc/self/status", "re");
    if (status == NULL) return false;
    char line[256];
    unsigned long long effective = 0;
    while (fgets(line, sizeof line, status) != NULL)
        if (sscanf(line, "CapEff: %llx", &effective) == 1) break;
    fclose(status);
    return (effective >> CAP_SYS_ADMIN_BIT & 1u) != 0;
}

static size_t read_whole(const char *path, char *buffer, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t got = read(file, buffer, size);
    close(file);
    return got < 0 ? 0 : (size_t)got;
}

/* Appends text as the inside of a JSON string; NUL (between arguments in cmdline) and other controls become blanks. */
static size_t append_escaped(char *line, size_t at, size_t size, const char *text, size_t length)
{
    while (length > 0 && (text[length - 1] == '\0' || text[length - 1] == '\n')) length--;
    for (size_t i = 0; i < length && at + 4 < size; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '"' || c == '\\') line[at++] = '\\';
        line[at++] = c < 0x20 || c >= 0x7f ? (c < 0x20 ? ' ' : '?') : (char)c;
    }
    return at;
}

void sim_log_write(const char *function, const char *uuid, const char *arguments, nvmlReturn_t result)
{
    char path[PATH_MAX + 16], comm[64], cmdline[1024], host[256] = "", line[4096];
    snprintf(path, sizeof path, "%s/writes.log", sim_directory());
    size_t comm_length = read_whole("/proc/self/comm", comm, sizeof comm);
    size_t cmdline_length = read_whole("/proc/self/cmdline", cmdline, sizeof cmdline);
    gethostname(host, sizeof host - 1);
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    long long nanoseconds = (long long)now.tv_sec * 1000000000LL + now.tv_nsec;

    size_t at = (size_t)snprintf(line, sizeof line, "{\"timeNs\": %lld, \"pid\": %d, \"host\": \"", nanoseconds, (int)getpid());
    at = append_escaped(line, at, sizeof line - 512, host, strlen(host));
    at += (size_t)snprintf(line + at, sizeof line - at, "\", \"comm\": \"");
    at = append_escaped(line, at, sizeof line - 512, comm, comm_length);
    at += (size_t)snprintf(line + at, sizeof line - at, "\", \"cmdline\": \"");
    at = append_escaped(line, at, sizeof line - 512, cmdline, cmdline_length);
    at += (size_t)snprintf(line + at, sizeof line - at,
                           "\", \"function\": \"%s\", \"uuid\": \"%s\", \"args\": [%s], \"result\": %d}\n", function, uuid,
                           arguments, result);

    int file = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
    if (file < 0) return; /* a read-only directory: such a caller can change nothing either */
    ssize_t written = write(file, line, at);
    (void)written; /* the log is for tests; a full disk must not change what the driver answers */
    close(file);
}
