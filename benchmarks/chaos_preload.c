/* Preloaded into the processes that `chaos.py` disturbs: a clock that jumps and a disk that is slow.
 *
 * CHAOS_CONTROL names a file of two 64-bit numbers that the process maps: nanoseconds that the wall clock is ahead, and
 * nanoseconds that fsync and fdatasync take longer. CHAOS_STORE, if set, names the file for PostgreSQL, whose
 * environment is its starter's own: execve hands the preload on to it.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t nothing[2];
static const volatile int64_t *control = nothing;
static int (*real_gettime)(clockid_t, struct timespec *);
static int (*real_fsync)(int), (*real_fdatasync)(int);
static int (*real_execve)(const char *, char *const[], char *const[]);

__attribute__((constructor)) static void begin(void) {
    real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    real_fsync = dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
    real_execve = dlsym(RTLD_NEXT, "execve");
    const char *path = getenv("CHAOS_CONTROL");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof nothing, PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) control = mapped;
    close(file);
}

int clock_gettime(clockid_t which, struct timespec *at) {
    if (!real_gettime) real_gettime = dlsym(RTLD_NEXT, "clock_gettime");
    int done = real_gettime(which, at);
    if (!done && control[0] && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) {
        int64_t shifted = at->tv_sec * INT64_C(1000000000) + at->tv_nsec + control[0];
        at->tv_sec = shifted / INT64_C(1000000000);
        at->tv_nsec = shifted % INT64_C(1000000000);
    }
    return done;
}

int gettimeofday(struct timeval *at, void *zone) {
    (void)zone;
    struct timespec now;
    if (clock_gettime(CLOCK_REALTIME, &now)) return -1;
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

static void slow(void) {
    int64_t wait = control[1];
    if (wait > 0) nanosleep(&(struct timespec){wait / INT64_C(1000000000), wait % INT64_C(1000000000)}, NULL);
}

int fsync(int file) { slow(); return real_fsync(file); }
int fdatasync(int file) { slow(); return real_fdatasync(file); }

int execve(const char *path, char *const arguments[], char *const environment[]) {
    const char *store = getenv("CHAOS_STORE"), *self = getenv("LD_PRELOAD");
    size_t count = 0;
    while (environment && environment[count]) count++;
    if (!store || !self || count > 500) return real_execve(path, arguments, environment);
    static char preload[4200], where[4200];
    snprintf(preload, sizeof preload, "LD_PRELOAD=%s", self);
    snprintf(where, sizeof where, "CHAOS_CONTROL=%s", store);
    char *more[512];
    size_t kept = 0;
    for (size_t at = 0; at < count; at++)
        if (strncmp(environment[at], "LD_PRELOAD=", 11) && strncmp(environment[at], "CHAOS_", 6))
            more[kept++] = environment[at];
    more[kept++] = preload;
    more[kept++] = where;
    more[kept] = NULL;
    return real_execve(path, arguments, more);
}
