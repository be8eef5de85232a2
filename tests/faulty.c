/* A C library between Python and the system that counts what changes a folder, and at one of the calls ends the process, or says that the disk is
   full or read-only. Loaded with LD_PRELOAD by faulty.py; does nothing until it is armed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, TRACE, KILL, FULL, READONLY };
static int mode = OFF, log_fd = -1;
static long at = 0, target = 0;
static char root[4096];

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

void arm(int how, long n, const char *folder, int fd) {
    target = n; at = 0; log_fd = fd;
    snprintf(root, sizeof root, "%s", folder);
    mode = how;
}

static int inside(const char *path) {
    if (path[0] != '/') return 1; /* the working folder is the one that is watched */
    return !strncmp(path, root, strlen(root));
}

static int fd_inside(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    if (n < 0) return 0;
    path[n] = 0;
    return path[0] == '/' && !strncmp(path, root, strlen(root));
}

static void end_here(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* 0: go on; 1: fail, with errno set; 2: half of it, then end or fail */
static int hit(const char *op, const char *path, int takes_room) {
    if (mode == OFF) return 0;
    at++;
    if (mode == TRACE) { dprintf(log_fd, "%ld %s %s\n", at, op, path); return 0; }
    if (mode == READONLY) { errno = EROFS; return 1; }
    if (at < target) return 0;
    if (mode == KILL) { if (!strcmp(op, "write")) return 2; end_here(); }
    if (!takes_room) return 0;
    if (!strcmp(op, "write") && at == target) return 2;
    errno = ENOSPC;
    return 1;
}

static int opened(const char *path, int flags) {
    if (!(flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) || !inside(path)) return 0;
    return hit("open", path, (flags & O_CREAT) && access(path, F_OK));
}
#define OPENS(name) int name(const char *path, int flags, ...) { REAL(name); va_list a; va_start(a, flags); int m = va_arg(a, int); va_end(a); \
    if (mode && opened(path, flags)) return -1; return real(path, flags, m); }
OPENS(open)
OPENS(open64)
#define OPENATS(name) int name(int dir, const char *path, int flags, ...) { REAL(name); va_list a; va_start(a, flags); int m = va_arg(a, int); va_end(a); \
    if (mode && opened(path, flags)) return -1; return real(dir, path, flags, m); }
OPENATS(openat)
OPENATS(openat64)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    char path[4096];
    if (mode && fd != log_fd && fd_inside(fd, path)) {
        int how = hit("write", path, 1);
        if (how == 1) return -1;
        if (how == 2) { ssize_t done = n > 1 ? real(fd, data, n/2) : 0; if (mode == KILL) end_here(); if (!done) { errno = ENOSPC; return -1; } return done; }
    }
    return real(fd, data, n);
}
#define ON(name, ret, arguments, passed, there, room, place) ret name arguments { REAL(name); char path[4096]; \
    if (mode && there && hit(#name, place, room)) return -1; return real passed; }
#define ON_FD(name, ret, arguments, passed, room) ON(name, ret, arguments, passed, fd_inside(fd, path), room, path)
#define ON_PATH(name, arguments, passed, room) ON(name, int, arguments, passed, inside(where), room, where)
ON_FD(writev, ssize_t, (int fd, const struct iovec *parts, int n), (fd, parts, n), 1)
ON_FD(pwrite, ssize_t, (int fd, const void *data, size_t n, off_t to), (fd, data, n, to), 1)
ON_FD(pwrite64, ssize_t, (int fd, const void *data, size_t n, off64_t to), (fd, data, n, to), 1)
ON_FD(fsync, int, (int fd), (fd), 1)
ON_FD(fdatasync, int, (int fd), (fd), 1)
ON_FD(ftruncate, int, (int fd, off_t n), (fd, n), 0)
ON_FD(ftruncate64, int, (int fd, off64_t n), (fd, n), 0)
ON_FD(fchmod, int, (int fd, mode_t m), (fd, m), 0)
ON_FD(sendfile, ssize_t, (int fd, int from, off_t *begin, size_t n), (fd, from, begin, n), 1)
ON_FD(sendfile64, ssize_t, (int fd, int from, off64_t *begin, size_t n), (fd, from, begin, n), 1)
ON_FD(copy_file_range, ssize_t, (int in, off64_t *a, int fd, off64_t *b, size_t n, unsigned f), (in, a, fd, b, n, f), 1)
ON_PATH(mkdir, (const char *where, mode_t m), (where, m), 1)
ON_PATH(rmdir, (const char *where), (where), 0)
ON_PATH(unlink, (const char *where), (where), 0)
ON_PATH(rename, (const char *where, const char *to), (where, to), 0)
ON_PATH(link, (const char *where, const char *to), (where, to), 1)
ON_PATH(symlink, (const char *to, const char *where), (to, where), 1)
ON_PATH(chmod, (const char *where, mode_t m), (where, m), 0)
ON_PATH(mkdirat, (int dir, const char *where, mode_t m), (dir, where, m), 1)
ON_PATH(unlinkat, (int dir, const char *where, int f), (dir, where, f), 0)
ON_PATH(renameat, (int dir, const char *where, int other, const char *to), (dir, where, other, to), 0)
ON_PATH(fchmodat, (int dir, const char *where, mode_t m, int f), (dir, where, m, f), 0)
