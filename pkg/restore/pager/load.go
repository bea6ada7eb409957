package pager

import (
	"bytes"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// sliceTime is how long a thread of the pager goes on before another may have its
// processor, as the kernel takes it for ordinary threads since Linux 6.12. By
// default that is some milliseconds, for which a request would wait.
const sliceTime = 100 * time.Microsecond

// ownThread gives the goroutine a thread, which ends with it, and which leaves its
// processor soon to whoever wants it.
func ownThread() {
	runtime.LockOSThread()
	// A hint: before Linux 6.12 it does nothing.
	unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Runtime: uint64(sliceTime)}, 0)
}

// load is what the machine has to do. It has one user.
type load struct {
	fd  int // of /proc/loadavg; negative where it cannot be read
	buf [128]byte
}

func openLoad() *load {
	fd, err := unix.Open("/proc/loadavg", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fd = -1
	}
	return &load{fd: fd}
}

func (l *load) close() {
	if l.fd >= 0 {
		unix.Close(l.fd)
	}
}

// crowded tells whether more threads than so many for each processor want one,
// the caller's included. Where that cannot be known they may.
func (l *load) crowded(each int) bool {
	n, err := unix.Pread(l.fd, l.buf[:], 0)
	if err != nil {
		return true
	}
	runnable, ok := parseRunnable(l.buf[:n])
	return !ok || runnable > each*runtime.NumCPU()
}

// parseRunnable is the number of threads that run or could, of the content of
// /proc/loadavg: three averages, that number/all threads, a process.
func parseRunnable(b []byte) (int, bool) {
	fields := bytes.Fields(b)
	if len(fields) != 5 {
		return 0, false
	}
	runnable, _, ok := bytes.Cut(fields[3], []byte{'/'})
	n, err := strconv.Atoi(string(runnable))
	return n, ok && err == nil
}
