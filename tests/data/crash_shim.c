/* Counts the calls that change a folder and fails one of them: gcc -O1 -shared -fPIC -o kp.so crash_shim.c -ldl, then
   LD_PRELOAD it. kp_arm(root, k, mode): mode 0 = SIGKILL before the k-th call under root, 1 = half a write, then
   SIGKILL, 2 = ENOSPC from call k on (for calls that need space). Absolute paths only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>
static volatile int armed, mode; static volatile long n, k; static char root[512];
void kp_arm(const char *r, long kk, int m) { strncpy(root, r, 511); n = 0; k = kk; mode = m; armed = 1; }
void kp_disarm(void) { armed = 0; }
long kp_count(void) { return n; }
static int inp(const char *p) { return armed && strncmp(p, root, strlen(root)) == 0; }
static int inf(int fd) { char p[64], b[600]; if (!armed) return 0; snprintf(p, 64, "/proc/self/fd/%d", fd);
  ssize_t m = readlink(p, b, 599); if (m <= 0) return 0; b[m] = 0; return inp(b); }
static int hit(int grows) { n++; if (mode == 2) return (grows && k > 0 && n >= k) ? 2 : 0;
  if (n == k) { if (mode == 0) kill(getpid(), SIGKILL); return 1; } return 0; }
#define REAL(name) __typeof__(&name) f = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define GATE(cond, grows, fail) if (cond) { int z = hit(grows); if (z == 2) { errno = ENOSPC; return fail; } if (z) kill(getpid(), SIGKILL); }
#define HALF(cond, half) if (cond) { int z = hit(1); if (z == 2) { errno = ENOSPC; return -1; } if (z) { half; kill(getpid(), SIGKILL); } }
ssize_t write(int fd, const void *b, size_t c) { REAL(write); HALF(inf(fd), f(fd, b, c / 2)) return f(fd, b, c); }
ssize_t pwrite64(int fd, const void *b, size_t c, off64_t o) { REAL(pwrite64); HALF(inf(fd), f(fd, b, c / 2, o)) return f(fd, b, c, o); }
ssize_t writev(int fd, const struct iovec *v, int c) { REAL(writev); GATE(inf(fd), 1, -1) return f(fd, v, c); }
ssize_t sendfile(int o, int i, off_t *at, size_t c) { REAL(sendfile); HALF(inf(o), f(o, i, at, 5)) return f(o, i, at, c); }
ssize_t sendfile64(int o, int i, off64_t *at, size_t c) { REAL(sendfile64); HALF(inf(o), f(o, i, at, 5)) return f(o, i, at, c); }
int fsync(int fd) { REAL(fsync); GATE(inf(fd), 1, -1) return f(fd); }
int fdatasync(int fd) { REAL(fdatasync); GATE(inf(fd), 1, -1) return f(fd); }
int ftruncate64(int fd, off64_t o) { REAL(ftruncate64); GATE(inf(fd), 1, -1) return f(fd, o); }
int rename(const char *a, const char *b) { REAL(rename); GATE(inp(a) || inp(b), 0, -1) return f(a, b); }
int unlink(const char *a) { REAL(unlink); GATE(inp(a), 0, -1) return f(a); }
int unlinkat(int fd, const char *a, int flags) { REAL(unlinkat); GATE(inp(a) || inf(fd), 0, -1) return f(fd, a, flags); }
int rmdir(const char *a) { REAL(rmdir); GATE(inp(a), 0, -1) return f(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); GATE(inp(a), 1, -1) return f(a, m); }
#define OPEN(name) int name(const char *p, int fl, ...) { REAL(name); mode_t m = 0; if (fl & O_CREAT) { va_list a; va_start(a, fl); m = va_arg(a, int); va_end(a); } \
  GATE((fl & (O_CREAT | O_TRUNC)) && inp(p), 1, -1) return f(p, fl, m); }
OPEN(open) OPEN(open64)
FILE *fopen(const char *p, const char *s) { REAL(fopen); GATE(s[0] != 'r' && inp(p), 1, 0) return f(p, s); }
FILE *fopen64(const char *p, const char *s) { REAL(fopen64); GATE(s[0] != 'r' && inp(p), 1, 0) return f(p, s); }
