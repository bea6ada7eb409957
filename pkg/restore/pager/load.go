package pager

import (
	"bytes"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

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
// the caller's included; or what the caller takes for it where that is not known.
// Threads are those of the whole machine, processors those that this process may
// use: where these are few the answer is yes too often.
func (l *load) crowded(each int, unknown bool) bool {
	n, err := unix.Pread(l.fd, l.buf[:], 0)
	if err != nil {
		return unknown
	}
	runnable, ok := parseRunnable(l.buf[:n])
	if !ok {
		return unknown
	}
	return runnable > each*runtime.NumCPU()
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
